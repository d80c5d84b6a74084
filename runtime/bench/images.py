"""Timings of answers about images: how long until the first commit, and how much of it the images take.

Cases are those of the bench and take turns; every round looks at the images anew.
Nothing here knows a back end or a policy by name.
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
class Look:
    """One case, and what its rounds took: seconds to the images' rows, to the first commit, and to the answer."""

    case: Case
    image: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    image_tokens: int = 0

    def run(self, images: Sequence[Path], gen_length: int) -> None:
        model, began = self.case.model, time.perf_counter()
        events = model.stream(QUESTION, self.case.policy, images, gen_length=gen_length, **self.case.options)
        first = None
        for event in events:
            if first is None and not isinstance(event, Output) and event.committed:
                first = time.perf_counter() - began
        assert isinstance(event, Output) and first is not None
        self.first.append(first)
        self.whole.append(time.perf_counter() - began)
        self.image.append(event.image_seconds)
        self.tokens.append(event.tokens)
        self.image_tokens = sum(token >= model.bundle.config.vocab for token in event.sequence)

    def figures(self) -> dict[str, Any]:
        """Medians over the rounds; `image_share` is the images' part of the time to the answer."""
        return {
            "case": self.case.name, "options": self.case.options, "rounds": len(self.whole),
            "image_tokens": self.image_tokens, "tokens": statistics.fmean(self.tokens),
            "image_seconds": statistics.median(self.image), "first_commit_seconds": statistics.median(self.first),
            "answer_seconds": statistics.median(self.whole),
            "image_share": statistics.median(a / b for a, b in zip(self.image, self.whole, strict=True)),
        }  # fmt: skip


def look(cases: Sequence[Case], images: Sequence[Path], rounds: int, gen_length: int) -> Iterator[list[Look]]:
    """Warm every case up, then take turns; yields all of them after each round.

    Raises OptionError for fewer than one round, and for a model that sees no images.
    """
    if rounds < 1:
        raise OptionError(f"limit must be at least 1, got {rounds}")
    looks = [Look(case) for case in cases]
    for one in looks:
        Look(one.case).run(images, gen_length)
    for _ in range(rounds):
        for one in looks:
            one.run(images, gen_length)
        yield looks
