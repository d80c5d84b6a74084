"""How sure a share is, and a difference of two shares on the same problems."""

import math
from dataclasses import asdict, dataclass
from typing import Any

Z = 1.959964  # of a two-sided 95 % interval


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share right / count (Wilson 1927)."""
    share, z2 = right / count, Z * Z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count)) / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p-value that the problems only one of two has right are spread by chance (McNemar 1947)."""
    count = gained + lost
    tail = sum(math.comb(count, k) for k in range(min(gained, lost) + 1))
    return min(1.0, float(2 * tail / 2**count))


@dataclass(frozen=True)
class Paired:
    """Two ways on the same problems: what the first gained and lost against the second.

    `difference` is the first's share right minus the second's, with its 95 %
    interval (Bonett and Price 2012: one more problem gained and one more lost).
    """

    problems: int
    gained: int
    lost: int
    difference: float
    low: float
    high: float
    p: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def paired(first: list[bool], second: list[bool]) -> Paired:
    """Compare two ways problem by problem; both lists have the same problems in the same order."""
    gained = sum(a and not b for a, b in zip(first, second, strict=True))
    lost = sum(b and not a for a, b in zip(first, second, strict=True))
    count = len(first)
    up, down, total = gained + 1, lost + 1, count + 2
    middle = (up - down) / total
    half = Z * math.sqrt((up + down) / total - middle**2) / math.sqrt(total)
    return Paired(count, gained, lost, (gained - lost) / count, middle - half, middle + half, mcnemar(gained, lost))


def agreement(first: list[int], second: list[int]) -> float:
    """The share of positions with the same token, of as many as the longer answer has; 1 if both are empty."""
    longest = max(len(first), len(second))
    return sum(a == b for a, b in zip(first, second, strict=False)) / longest if longest else 1.0
