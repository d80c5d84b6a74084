"""The text of an answer while its masks are filled: all of it with its masks, or the part that will not change."""

from collections.abc import Iterable, Iterator
from itertools import groupby

import numpy as np

from runtime.api import Runtime
from runtime.decoding.controller import StepEvent
from runtime.decoding.generate import Decode, Output, spell_ids
from runtime.decoding.request import Request
from runtime.decoding.sequence import Positions

MASK = "░"


class Answer:
    """The ids of an answer so far, which `add` fills in, and their text."""

    def __init__(self, model: Runtime, prompt_length: int, request: Request):
        config = model.bundle.config
        self.decode, self.mask, self.start = model.decode or spell_ids, config.mask_id, prompt_length
        self.ends = (config.end_id if request.eos_id is None else request.eos_id,)
        self.stops = () if request.stop is None else (request.stop,)
        self.ids: Positions = np.full(request.gen_length, self.mask, np.int64)

    def add(self, event: StepEvent) -> None:
        """Fill in what a step committed."""
        self.ids[np.array(event.committed, np.int64) - self.start] = event.tokens

    @property
    def frame(self) -> str:
        """The text with its masks, up to the first end."""
        shown = frame(self.ids, self.mask, self.ends, self.decode)
        cut = self._before_stop(shown)
        return shown if MASK in cut else cut

    @property
    def settled(self) -> str:
        """The text before the first mask or end, without what later tokens may change.

        That is a character of which bytes are missing, and what may be the start of a stop string.
        """
        text = self._before_stop(self.decode(before(self.ids, (self.mask, *self.ends)))).rstrip("\ufffd")
        begun = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(begun, default=0)]

    def _before_stop(self, text: str) -> str:
        return min((text.partition(stop)[0] for stop in self.stops), key=len, default=text)


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


def before(ids: Positions, ends: tuple[int, ...]) -> Positions:
    """The ids [n] before the first of `ends`."""
    found = np.flatnonzero(np.isin(ids, ends))
    return ids[: found[0]] if len(found) else ids


def frame(answer: Positions, mask: int, ends: tuple[int, ...], decode: Decode) -> str:
    """The text of an answer's ids up to the first end: MASK for each mask, and each run between masks decoded alone.

    A character of which some bytes are still masked is shown as U+FFFD.
    """
    runs = ((masked, np.array(list(run))) for masked, run in groupby(before(answer, ends), lambda one: one == mask))
    return "".join(MASK * len(run) if masked else decode(run) for masked, run in runs)
