"""Confidence intervals and tests of exact match, and the agreement of two answers.

statsmodels (the extra `eval`) computes Wilson's interval and McNemar's test; it is imported at the first call.
"""

from dataclasses import asdict, dataclass
from typing import Any

from engines.errors import INSTALL, OptionError

CONFIDENCE = 0.95  # two-sided


def require() -> None:
    """Raise OptionError if the statistics library is not installed."""
    try:
        import statsmodels  # noqa: F401
    except ImportError as error:
        raise OptionError(
            f"evaluation needs statsmodels, which is not installed; {INSTALL.format(extra='eval')}"
        ) from error


def wilson(correct: int, count: int) -> tuple[float, float]:
    """The 95 % interval of the proportion correct / count (Wilson 1927, JASA 22:209)."""
    require()
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(correct, count, alpha=1 - CONFIDENCE, method="wilson")
    return float(low), float(high)


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided exact p-value of McNemar's test (1947, Psychometrika 12:153) from its discordant pairs."""
    require()
    from statsmodels.stats.contingency_tables import mcnemar as test

    return float(test([[0, gained], [lost, 0]], exact=True).pvalue)


@dataclass(frozen=True)
class Paired:
    """A comparison of two settings on the same problems.

    `gained` problems are correct with the first setting only, `lost` with the second only. `difference` is the first
    proportion correct minus the second, and `low` … `high` its 95 % interval.
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
    """Compare two settings problem by problem; both lists hold the same problems in the same order.

    The interval is the adjusted Wald interval with one problem added to each cell of the discordant pairs (Bonett and
    Price 2012, J. Educ. Behav. Stat. 37:479), which statsmodels does not have.
    """
    require()
    from scipy.stats import norm

    gained = sum(a and not b for a, b in zip(first, second, strict=True))
    lost = sum(b and not a for a, b in zip(first, second, strict=True))
    count = len(first)
    total = count + 2
    p12, p21 = (gained + 1) / total, (lost + 1) / total
    middle = p12 - p21
    half = float(norm.ppf((1 + CONFIDENCE) / 2)) * ((p12 + p21 - middle**2) / total) ** 0.5
    return Paired(
        problems=count, gained=gained, lost=lost, difference=(gained - lost) / count,
        low=middle - half, high=middle + half, p=mcnemar(gained, lost),
    )  # fmt: skip


def agreement(first: list[int], second: list[int]) -> float:
    """The fraction of positions with the same token, over the length of the longer answer; 1 if both are empty."""
    longest = max(len(first), len(second))
    return sum(a == b for a, b in zip(first, second, strict=False)) / longest if longest else 1.0
