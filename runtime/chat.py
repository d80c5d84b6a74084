"""A conversation: its history, its figures, and the text of an answer while its masks are filled.

The texts to show follow from the prompt's length, the step events and the tokenizer; `runtime.cli.terminal` draws them.
"""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from engines.errors import BundleError
from engines.vision import Rows
from runtime.answer import Answer
from runtime.api import Runtime
from runtime.decoding.generate import Output
from runtime.decoding.request import Request
from runtime.images.decode import Source
from runtime.images.prompt import mention


@dataclass(frozen=True)
class Note:
    """A line for the user that is not part of the answer."""

    text: str


@dataclass
class Figures:
    """Totals over the finished answers; `seconds` is the time of the steps, without drawing."""

    turns: int = 0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    rows: int = 0  # computed, summed over layers
    possible: float = 0.0  # rows that full passes would have computed
    last: float = 0.0  # computed fraction of the last answer

    def add(self, out: Output) -> None:
        """Add a finished answer."""
        rows = sum(event.rows for event in out.trace)
        self.turns += 1
        self.tokens += out.tokens
        self.steps += out.steps
        self.seconds += sum(event.seconds for event in out.trace)
        self.rows += rows
        self.possible += rows / out.computed_fraction
        self.last = out.computed_fraction

    def __str__(self) -> str:
        if not self.turns:
            return "no answer yet"
        return (
            f"{self.turns} turn{'s' * (self.turns > 1)}, {self.tokens} tokens in {self.steps} steps, "
            f"{self.seconds:.3f} s, {self.tokens / self.seconds:.1f} tokens/s; layer-rows computed: "
            f"{self.last:.1%} of the last answer, {self.rows / self.possible:.1%} in all"
        )


class Chat:
    """The finished turns of a conversation, and the options of the next. Options are those of `Runtime.stream`.

    Raises OptionError for options with which no turn could be decoded, BundleError for a bundle without a tokenizer.
    """

    def __init__(
        self, model: Runtime, policy: str | None = None, options: dict[str, Any] | None = None,
        system: str | None = None,
    ):  # fmt: skip
        if not model.has_text:
            raise BundleError(
                f"{model.bundle.root} has no tokenizer.json, needed to chat; use generate with --prompt-ids"
            )
        self.model, self.policy, self.options = model, policy, options or {}
        self.request = model.check_options(policy, self.options)
        self.limit = model.bundle.capacity.max_length
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[tuple[str, str]] = []  # (user, assistant) of the finished turns
        self.images: list[list[Rows]] = []  # of each of them, as rows [tokens, d]
        self.waiting: list[Rows] = []  # images of the next turn
        self.figures = Figures()

    def reset(self) -> None:
        """Forget all turns and images; the figures stay."""
        self.turns, self.images, self.waiting = [], [], []

    def attach(self, image: Source) -> None:
        """Encode an image that belongs to the next turn.

        Raises OptionError for a model without a vision tower, PromptError for an image that cannot be decoded.
        """
        self.waiting += self.model.encode_images([image], self.request.image_layout)

    def messages(self, turns: list[tuple[str, str]], text: str) -> list[dict[str, str]]:
        """The system message, the turns, and the user's text as chat messages."""
        history = [(role, words) for turn in turns for role, words in zip(("user", "assistant"), turn, strict=True)]
        return [*self.system, *({"role": role, "content": words} for role, words in [*history, ("user", text)])]

    def say(self, text: str) -> Generator[Note | str | Output, None, None]:
        """Answer the user: yield the text to show after each step, with its masks, then the Output.

        The turn is added to the history with the Output; a generator closed before that changes nothing. The oldest
        turns are dropped if the prompt would be too long with them; then a Note is yielded first. Raises PromptError
        if the text alone is too long, or cannot be decoded.
        """
        if self.waiting:
            assert self.model.bundle.config.vision is not None
            text = mention(text, self.model.bundle.config.vision.placeholder, len(self.waiting))
        dropped, request = self._fit(text)
        prompt = request.prompt_ids
        if dropped:
            what = f"{dropped} oldest turns are" if dropped > 1 else "oldest turn is"
            yield Note(
                f"the {what} left out: with more history and gen_length {self.request.gen_length} "
                f"the prompt would exceed the bundle's length {self.limit}"
            )
        answer = Answer(self.model, len(prompt), self.request)
        steps = self.model.stream(prompt, self.policy, **self.options | {"embeddings": request.embeddings})
        assert isinstance(steps, Generator)
        with closing(steps):  # else the model stays in use
            for event in steps:
                if not isinstance(event, Output):
                    answer.add(event)
                    yield answer.frame
        assert isinstance(event, Output)
        self.turns = [*self.turns[dropped:], (text, event.text)]
        self.images, self.waiting = [*self.images[dropped:], self.waiting], []
        self.figures.add(event)
        yield event

    def _fit(self, text: str) -> tuple[int, Request]:
        """The number of oldest turns to drop and the prompt without them; 0 if the text alone is too long."""
        for dropped in range(len(self.turns) + 1):
            images = [image for turn in (*self.images[dropped:], self.waiting) for image in turn]
            request = self.model.request(self.messages(self.turns[dropped:], text), images, {})
            if len(request.prompt_ids) + self.request.gen_length <= self.limit:
                return dropped, request
        return 0, request  # the stream refuses it
