"""What a policy says of a step, and how its options are checked. No policy is in here."""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, Protocol

from engines.config import Capacity
from engines.errors import OptionError
from runtime.decoding.sampler import Ranking
from runtime.decoding.sequence import Positions, Sequence


@dataclass(frozen=True)
class StepPlan:
    """One step: rows to run (`active`, None for the whole sequence), masks to predict, commits.

    `commits` is the number of most confident candidates to commit; None commits
    by the threshold. With `chance` each candidate is committed with that
    probability instead.
    """

    active: Positions | None
    candidates: Positions
    commits: int | None
    chance: float | None = None


class Policy(Protocol):
    """Plans each step from the sequence alone (and the tracked tokens, if it watches drift)."""

    name: ClassVar[str]
    threshold: float | None

    @property
    def watches(self) -> bool: ...
    @property
    def ranking(self) -> Ranking: ...
    def check(self, capacity: Capacity, gen_length: int) -> None: ...
    def plan(self, sequence: Sequence, step: int, tracked: Positions) -> StepPlan: ...


def logits_rows(sequence: Sequence, candidates: Positions) -> tuple[Positions, ...]:
    """The rows that predict `candidates`, where they are others than their own."""
    return (sequence.logits_rows(candidates),) if sequence.shift else ()


def within(name: str, value: Any, low: float, high: float, why: str) -> None:
    number = isinstance(value, Integral if isinstance(low, int) else Real) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise OptionError(f"{name} must lie in {low} … {high} ({why}), got {value}")


def among(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_threshold(value: float | None) -> None:
    if value is not None and not (isinstance(value, Real) and 0 < float(value) <= 1):
        raise OptionError(f"threshold must lie in (0, 1] (a probability), got {value}")
