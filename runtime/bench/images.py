"""Timings of answers about images: seconds to the first commit, and the fraction that encoding the images takes.

The cases are those of the bench and take turns; every round encodes the images again.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.errors import OptionError
from runtime.bench.cases import Case
from runtime.decoding.generate import Output

QUESTION = "What is shown?"


@dataclass
class ImageCase:
    """One case, and the seconds of its rounds: to the images' rows, to the first commit, and to the whole answer."""

    case: Case
    image: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    answer: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    image_tokens: int = 0

    def run(self, images: Sequence[Path], gen_length: int) -> None:
        """Answer the question once and record the times."""
        model, began = self.case.model, time.perf_counter()
        events = model.stream(QUESTION, self.case.policy, images, gen_length=gen_length, **self.case.options)
        first = None
        for event in events:
            if first is None and not isinstance(event, Output) and event.committed:
                first = time.perf_counter() - began
        assert isinstance(event, Output) and first is not None
        self.first.append(first)
        self.answer.append(time.perf_counter() - began)
        self.image.append(event.image_seconds)
        self.tokens.append(event.tokens)
        self.image_tokens = sum(token >= model.bundle.config.vocab for token in event.sequence)

    def figures(self) -> dict[str, Any]:
        """Medians over the rounds; `image_fraction` is the images' fraction of the time to the answer."""
        return {
            "case": self.case.name, "options": self.case.options, "rounds": len(self.answer),
            "image_tokens": self.image_tokens, "tokens": statistics.fmean(self.tokens),
            "image_seconds": statistics.median(self.image), "first_commit_seconds": statistics.median(self.first),
            "answer_seconds": statistics.median(self.answer),
            "image_fraction": statistics.median(a / b for a, b in zip(self.image, self.answer, strict=True)),
        }  # fmt: skip


def bench_images(
    cases: Sequence[Case], images: Sequence[Path], rounds: int, gen_length: int
) -> Iterator[list[ImageCase]]:
    """Warm every case up, then run all cases in turn; yields all of them after each round.

    Raises OptionError for fewer than one round, and for a model without a vision tower.
    """
    if rounds < 1:
        raise OptionError(f"limit must be at least 1, got {rounds}")
    for case in cases:
        ImageCase(case).run(images, gen_length)
    measured = [ImageCase(case) for case in cases]
    for _ in range(rounds):
        for one in measured:
            one.run(images, gen_length)
        yield measured
