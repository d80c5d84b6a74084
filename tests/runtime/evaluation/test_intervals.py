"""Intervals and tests against figures worked out elsewhere."""

import json
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.errors import OptionError
from runtime.evaluation.intervals import agreement, mcnemar, paired, wilson
from tests.support.cases import ROOT, refused


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0)],  # Newcombe 1998, table I; by symmetry
)
def test_wilson(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=5e-5)


def test_mcnemar() -> None:
    assert mcnemar(10, 2) == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1.0 and mcnemar(0, 6) == pytest.approx(2 / 64)


def test_paired() -> None:
    found = paired([True] * 8 + [False] * 2, [True] * 6 + [False] * 3 + [True])
    assert (found.gained, found.lost) == (2, 1) and found.difference == pytest.approx(0.1)
    half = 1.959964 * math.sqrt(5 / 12 - (1 / 12) ** 2) / math.sqrt(12)
    assert (found.low, found.high) == pytest.approx((1 / 12 - half, 1 / 12 + half))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=50))
def test_paired_is_antisymmetric(both: list[tuple[bool, bool]]) -> None:
    first, second = map(list, zip(*both, strict=True))
    one, other = paired(first, second), paired(second, first)
    assert (one.gained, one.lost, one.p) == (other.lost, other.gained, other.p)
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))


def test_agreement() -> None:
    assert agreement([1, 2, 3], [1, 2, 4]) == pytest.approx(2 / 3)
    assert agreement([1, 2], [1, 2, 3, 4]) == 0.5 and agreement([], []) == 1.0 and agreement([], [1]) == 0.0


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "statsmodels", None)
    for call in (lambda: wilson(1, 2), lambda: mcnemar(1, 2), lambda: paired([True], [False])):
        with refused(OptionError, "statsmodels, which is not installed", "pip install 'elastic-diffusion[eval]'"):
            call()
    assert agreement([1], [1]) == 1.0, "calibration and parity do without it"


@pytest.mark.parametrize("file", ["eval.json", "eval_few_shot.json"])
def test_kept_results_give_the_documented_figures(file: str) -> None:
    """Intervals and tests follow from the kept answers."""
    kept = json.loads((ROOT / "docs" / "benchmarks" / file).read_text())
    for run in kept["runs"]:
        correct = run["correct_each"]
        assert len(correct) == run["problems"] and run["interval"] == pytest.approx(
            wilson(correct.count("1"), len(correct))
        )
    for pair in kept["paired"]:
        settings = ({"policy": pair["against"]}, pair["setting"])
        second, first = (
            [bit == "1" for run in kept["runs"] if setting.items() <= run["key"].items() for bit in run["correct_each"]]
            for setting in settings
        )
        found = paired(first, second).to_json()
        assert found == pytest.approx({name: pair[name] for name in found})
