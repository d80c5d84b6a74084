"""A conversation: its history, what it has cost, and what an answer looks like while its masks are filled.

It knows no terminal and no commands (`runtime.cli.terminal` does), and nothing of how
a step is planned or run: what it yields follows from the prompt's length, the
events and the tokenizer.
"""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from engines.errors import BundleError
from engines.options import within
from engines.vision import Rows
from runtime.api import Runtime
from runtime.decoding.generate import Output
from runtime.decoding.request import Request, check_request
from runtime.decoding.sequence import Positions
from runtime.images.decode import Source
from runtime.images.prompt import mention
from runtime.text import Text

MASK = "░"


@dataclass(frozen=True)
class Note:
    """A line for the user that is no part of the answer."""

    text: str


@dataclass
class Figures:
    """What the answers that ended have cost; `seconds` are the steps' own, without the drawing."""

    turns: int = 0
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    rows: int = 0
    possible: float = 0.0
    last: float = 0.0

    def add(self, out: Output) -> None:
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
    """The turns that have ended, and how the next one is decoded. Options are those of `Runtime.stream`.

    Raises OptionError for options that no turn could be decoded with, BundleError
    for a bundle without a tokenizer.
    """

    def __init__(
        self, model: Runtime, policy: str | None = None, options: dict[str, Any] | None = None,
        system: str | None = None,
    ):  # fmt: skip
        if not model.has_text:
            raise BundleError(f"{model.bundle.root} has no tokenizer.json, and a chat is text; use generate with ids")
        self.model, self.policy, self.options = model, policy, options or {}
        chosen, given = model.resolve(policy, self.options)
        self.request = Request((), **given)
        self.limit = model.bundle.capacity.max_length
        within("gen_length", self.request.gen_length, 1, self.limit, "the bundle's length")
        chosen.check(model.bundle.capacity, self.request.gen_length)
        check_request(self.request, chosen, model.model, model.has_text)
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[tuple[str, str]] = []  # (user, assistant), those that ended
        self.images: list[list[Rows]] = []  # that came with each of them, as rows of the language model
        self.waiting: list[Rows] = []  # for the next
        self.figures = Figures()

    def reset(self) -> None:
        self.turns, self.images, self.waiting = [], [], []

    def attach(self, image: Source) -> None:
        """Look at an image that belongs to what the user says next.

        Raises OptionError for a model that sees none, PromptError for an image that cannot be decoded.
        """
        self.waiting += self.model.encode_images([image])

    def messages(self, turns: list[tuple[str, str]], text: str) -> list[dict[str, str]]:
        said = [(role, words) for turn in turns for role, words in zip(("user", "assistant"), turn, strict=True)]
        return [*self.system, *({"role": role, "content": words} for role, words in [*said, ("user", text)])]

    def say(self, text: str) -> Generator[Note | str | Output, None, None]:
        """Answer the user: what to show after each step, masks included, then the Output.

        The turn joins the history with the Output; closed before that, it leaves
        no trace. The oldest turns are dropped if the prompt would be too long with
        them, and a Note says so. Raises PromptError where the text alone is too
        long, or cannot be decoded.
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
        eos = self.model.bundle.config.end_id if self.request.eos_id is None else self.request.eos_id
        mask = self.model.bundle.config.mask_id
        answer = np.full(self.request.gen_length, mask)
        steps = self.model.stream(prompt, self.policy, **self.options | {"embeddings": request.embeddings})
        assert isinstance(steps, Generator)
        with closing(steps):  # or the model stays taken
            for event in steps:
                if not isinstance(event, Output):
                    answer[np.array(event.committed, np.int64) - len(prompt)] = event.tokens
                    yield frame(answer, mask, eos, self.model.text)
        assert isinstance(event, Output)
        self.turns = [*self.turns[dropped:], (text, event.text)]
        self.images, self.waiting = [*self.images[dropped:], self.waiting], []
        self.figures.add(event)
        yield event

    def _fit(self, text: str) -> tuple[int, Request]:
        """How many of the oldest turns must go, and the prompt without them; none where that would not help."""
        for dropped in range(len(self.turns) + 1):
            images = [image for turn in (*self.images[dropped:], self.waiting) for image in turn]
            request = self.model.request(self.messages(self.turns[dropped:], text), images, {})
            if len(request.prompt_ids) + self.request.gen_length <= self.limit:
                return dropped, request
        return 0, request  # refused by the stream


def frame(answer: Positions, mask: int, eos: int, text: Text) -> str:
    """The answer's ids up to the first EOS as text: a MASK for each mask, what lies between decoded by itself.

    A character whose bytes are not all there yet is U+FFFD.
    """
    ends = np.flatnonzero(answer == eos)
    ids = answer[: ends[0]] if len(ends) else answer
    runs = ((masked, np.array(list(run))) for masked, run in groupby(ids, lambda token: token == mask))
    return "".join(MASK * len(run) if masked else text.decode(run) for masked, run in runs)
