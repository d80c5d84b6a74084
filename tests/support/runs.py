"""Runs that back ends are compared on: their options, and what a run decided."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.decoding.generate import Output
from tests.support.comparison import NOISE, difference, recorded

PROMPT = np.arange(1, 25)
OPTIONS: list[dict[str, Any]] = [
    {"gamma": 0.9}, {"gamma": 0.999, "window": 8}, {"gamma": 0.5, "window": 8, "drift": "head"},
    {"gamma": 0.99, "window": 8, "refresh_scope": "near"}, {"gamma": 0.99, "window": 8, "block_caching": False},
    {"gamma": 0.99, "window": 4, "max_masks": 8}, {"gamma": 0.99, "window": 8, "refresh_start": "first"},
    {"gamma": 0.99, "window": 8, "drift": "head", "track_num": 1},
    {"gamma": 0.95, "track_num": 2, "temperature": 0.7, "seed": 3},
    {"policy": "full"}, {"policy": "prefix"}, {"policy": "dual"}, {"policy": "interval"},
]  # fmt: skip


def decisions(out: Output) -> list[Any]:
    """The decisions of each step: rows, trigger, window, commits, tokens and tracked tokens."""
    return [(e.active, e.trigger, e.window, e.committed, e.tokens, e.tracked, e.rows) for e in out.trace]


def sigma(out: Output) -> NDArray[np.float64]:
    """The sigmas of a run, one after the other; begins with a 0, so that it is never empty."""
    return np.concatenate([[0.0], *(event.sigma for event in out.trace)])


def near(out: Output, gamma: float) -> bool:
    """Whether float noise may change a decision of a run."""
    return any(event.margin < NOISE or any(abs(s - gamma) < NOISE for s in event.sigma) for event in out.trace)


def assert_same(ours: Output, theirs: Output) -> None:
    """Assert that two runs made the same decisions, with sigmas equal up to float noise."""
    assert difference(recorded(ours), recorded(theirs)) is None
    for name in ("window", "tokens", "rows", "trigger"):
        assert [getattr(e, name) for e in ours.trace] == [getattr(e, name) for e in theirs.trace], name
    gaps = [abs(a - b) for x, y in zip(ours.trace, theirs.trace, strict=True)
            for a, b in zip(x.sigma, y.sigma, strict=True)]  # fmt: skip
    assert max(gaps, default=0.0) < 1e-5
