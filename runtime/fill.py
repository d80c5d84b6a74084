"""The part of `runtime.api.Runtime` that fills canvases."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from engines.bundle import Bundle
from engines.errors import OptionError, PromptError
from engines.model import Model
from runtime.canvas import Filled, Form, edited
from runtime.decoding.events import StepEvent
from runtime.decoding.generate import Output, spell_ids, stream
from runtime.decoding.policies import Policy
from runtime.decoding.request import Request, flat_ids
from runtime.decoding.stops import Decode
from runtime.text import Text

Prompt = Any  # a user's text or chat messages [{"role": …, "content": …}]


class Filler:
    """Fills canvases with what a loaded bundle has."""

    bundle: Bundle
    model: Model
    text: Text

    @property
    @abstractmethod
    def decode(self) -> Decode | None:
        """Turns ids [n] into text."""

    @property
    @abstractmethod
    def unused(self) -> tuple[int, ...]:
        """The ids of the vocabulary that no token has."""

    @abstractmethod
    def resolve(self, policy: str | Policy | None, options: Mapping[str, Any]) -> tuple[Policy, dict[str, Any]]:
        """The policy that `options` make, and the options that belong to the request."""

    def fill(
        self, canvas: Any, prompt: Prompt | None = None, policy: str | Policy | None = None, **options: Any
    ) -> Filled:
        """Fill the holes of a canvas, and nothing else.

        `canvas` is text with holes such as `{{name:24}}` (`runtime.canvas`), or ids [P]
        with the mask's id in the holes. With a `prompt` a canvas in text is the
        assistant's answer to it. `policy` and `options` are those of `generate`, but
        `gen_length` and `stop`. Raises PromptError for a canvas that cannot be read,
        OptionError for options that a canvas has no use for.
        """
        *_, filled = self.fill_stream(canvas, prompt, policy, **options)
        assert isinstance(filled, Filled)
        return filled

    def fill_stream(
        self, canvas: Any, prompt: Prompt | None = None, policy: str | Policy | None = None, **options: Any
    ) -> Iterator[StepEvent | Filled]:
        """Fill a canvas step by step: a StepEvent for each step, then what the holes became; arguments as of `fill`."""
        if "gen_length" in options:
            raise OptionError("gen_length is for answers, and a canvas has its own holes; leave it out")
        chosen, given = self.resolve(policy, options)
        config = self.bundle.config
        ends = Request((), **given).end_ids(config)
        if isinstance(canvas, str):
            form = Form.of_text(self.text, canvas, prompt, config.mask_id, ends)
        elif prompt is None:
            form = Form.of_ids(flat_ids(canvas), config.mask_id)
        else:
            raise PromptError(
                "a prompt belongs to a canvas in text, and this one is ids; put the prompt's ids in front"
            )
        request = Request(form.ids, **given, canvas=form.canvas, unused=self.unused)
        for event in stream(self.model, request, chosen, self.decode):
            yield form.filled(event, ends, self.decode or spell_ids) if isinstance(event, Output) else event

    def edit(
        self, text: str, spans: Sequence[tuple[int, int]], prompt: Prompt | None = None,
        policy: str | Policy | None = None, **options: Any,
    ) -> Filled:  # fmt: skip
        """Write the characters of each span (start, end) of a text anew, in as many tokens; the rest stays as it is."""
        return self.fill(edited(self.text, text, spans), prompt, policy, **options)
