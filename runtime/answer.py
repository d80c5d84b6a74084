"""The text of an answer while its masks are filled: all of it with its masks, or the part that will not change."""

from collections.abc import Iterable, Iterator
from itertools import groupby

import numpy as np

from engines.options import listed
from runtime.api import Runtime
from runtime.decoding.events import StepEvent
from runtime.decoding.generate import Output, spell_ids
from runtime.decoding.request import Request
from runtime.decoding.sequence import Positions, before_first
from runtime.decoding.stops import Decode, complete, cut

MASK = "░"


class Answer:
    """The ids of an answer so far, which `add` fills in, and their text."""

    def __init__(self, model: Runtime, prompt_length: int, request: Request):
        config = model.bundle.config
        self.decode, self.mask, self.start = model.decode or spell_ids, config.mask_id, prompt_length
        self.ends, self.stops = request.end_ids(config), listed(request.stop)
        self.ids: Positions = np.full(request.gen_length, self.mask, np.int64)

    def add(self, event: StepEvent) -> None:
        """Fill in what a step committed."""
        at = np.array(event.committed, np.int64) - self.start
        kept = at < len(self.ids)  # a last block may reach beyond the answer
        self.ids[at[kept]] = np.array(event.tokens, np.int64)[kept]

    @property
    def frame(self) -> str:
        """The text with its masks, up to the first end."""
        ids = self._settled_ids
        if self.stops and complete(ids, self.decode, self.stops):
            return cut(ids, self.decode, self.stops)[1]
        return frame(self.ids, self.mask, self.ends, self.decode)

    @property
    def settled(self) -> str:
        """The text before the first mask or end, without what later tokens may change.

        That is a character of which bytes are missing, and what may be the start of a stop string.
        """
        ids = self._settled_ids
        text = (cut(ids, self.decode, self.stops)[1] if self.stops else self.decode(ids)).rstrip("\ufffd")
        begun = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(begun, default=0)]

    @property
    def _settled_ids(self) -> Positions:
        return before_first(self.ids, (self.mask, *self.ends))


def pieces(events: Iterable[StepEvent | Output], answer: Answer) -> Iterator[str | Output]:
    """The text piece by piece as it settles, then the Output. The pieces together are the Output's text.

    Should a decoder change what came before, the whole text follows on a line of its own.
    """
    shown = ""
    for event in events:
        if isinstance(event, Output):
            now, last = event.text, True
        else:
            answer.add(event)
            now, last = answer.settled, False
        if now.startswith(shown):
            if now != shown:
                yield now[len(shown) :]
            shown = now
        elif last:
            yield "\n" + now
        if isinstance(event, Output):
            yield event


def frame(answer: Positions, mask: int, ends: tuple[int, ...], decode: Decode) -> str:
    """The text of an answer's ids up to the first end: MASK for each mask, and each run between masks decoded alone.

    A character of which some bytes are still masked is shown as U+FFFD.
    """
    runs = (
        (masked, np.array(list(run))) for masked, run in groupby(before_first(answer, ends), lambda one: one == mask)
    )
    return "".join(MASK * len(run) if masked else decode(run) for masked, run in runs)
