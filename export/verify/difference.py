"""The difference between an output and the reference's."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Difference:
    """How far an output of a part is from the reference's: largest and mean absolute difference, cosine.

    `scale` is the reference's largest magnitude, or 1 if that is smaller:
    rounding errors of a hidden state grow with its largest number, and so does
    the tolerance.
    """

    part: str
    max: float
    mean: float
    cosine: float
    scale: float = 1.0

    @classmethod
    def of(cls, part: str, value: NDArray[Any], reference: NDArray[Any]) -> "Difference":
        """Compare two arrays of one shape; whole numbers (tokens, slots) by the fraction that differs."""
        if np.issubdtype(reference.dtype, np.integer):
            differs = value != reference
            return cls(part, max=float(differs.any()), mean=float(differs.mean()), cosine=1.0 - float(differs.mean()))
        a, b = value.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
        gap = np.abs(a - b)
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        return cls(
            part,
            max=float(gap.max()),
            mean=float(gap.mean()),
            cosine=float(a @ b / norms) if norms else 1.0,
            scale=max(1.0, float(np.abs(b).max())),
        )

    def within(self, atol: float) -> bool:
        """Whether the largest difference is at most `atol` times the scale; not where it is NaN."""
        return self.max <= atol * self.scale
