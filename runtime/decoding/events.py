"""What a decoding step reports."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class StepEvent:
    """What a step did. Positions are absolute, layers count from 0.

    `active` counts the active rows. `sigma` has the sigma of each layer that was
    tested, `trigger` the first layer whose sigma was below gamma, `refreshed_from` the
    first of the layers that were refreshed because of it, up to the last. `window` are
    the candidates, `committed` those that got their `tokens` with `confidences`,
    `tracked` the tracked positions after the step. `rows` counts the rows computed, summed over layers. `margin` is the
    smallest change of one confidence that would have changed the commits; 1.0 where
    none would, or where they were drawn at random. `seconds` is the wall-clock time
    of the step.
    """

    step: int
    active: int
    sigma: list[float]
    trigger: int | None
    refreshed_from: int | None
    window: list[int]
    committed: list[int]
    tokens: list[int]
    confidences: list[float]
    tracked: list[int]
    rows: int
    margin: float
    seconds: float

    @property
    def refreshed(self) -> bool:
        """Whether layers were refreshed: there was a trigger, and a layer to refresh."""
        return self.refreshed_from is not None

    def to_json(self) -> dict[str, Any]:
        """The event as JSON values, by field name."""
        return asdict(self)
