"""An answer that unrolls, and a window that reaches only so far: the same tokens on every back end."""

from pathlib import Path
from typing import Any

import pytest

import runtime
from engines.errors import OptionError
from runtime.decoding.generate import Output
from tests.support.cases import refused
from tests.support.comparison import difference, recorded
from tests.support.goldens import GOLDEN
from tests.support.oracle import Oracle

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
OPTIONS: list[dict[str, Any]] = [
    {"window": 4, "max_masks": 8, "threshold": 0.3},
    {"window": 4, "max_masks": 12, "tokens_per_step": 3, "gamma": 0.999},
    {"window": 8, "max_masks": 16, "threshold": 0.5, "gamma": 0.99, "refresh_scope": "near"},
    {"window": 8, "max_masks": 20, "threshold": 0.3, "window_span": 5, "gamma": 0.98},
    {"window": 8, "max_masks": 16, "threshold": 0.5, "gamma": 0.99, "refresh_start": "first"},
    {"window": 8, "window_span": 3, "tokens_per_step": 2, "refresh_scope": "near", "gamma": 0.999},
    {"window": 4, "max_masks": 9, "tokens_per_step": 1, "block_caching": False, "track_num": 2},
]


@pytest.fixture(scope="module")
def eager(golden_bundle: Path) -> Any:
    with runtime.load(golden_bundle, "eager", threads=1) as model:
        yield model


def run(model: runtime.Runtime, **options: Any) -> Output:
    return model.generate(PROMPT, gen_length=48, stop_at_eos=False, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_back_ends_agree(golden: runtime.Runtime, eager: runtime.Runtime, options: dict[str, Any]) -> None:
    ours, theirs = run(golden, **options), run(eager, **options)
    assert [(e.committed, e.tokens, e.trigger, e.tracked) for e in ours.trace] == [
        (e.committed, e.tokens, e.trigger, e.tracked) for e in theirs.trace
    ]
    gap = max(abs(a - b) for x, y in zip(ours.trace, theirs.trace, strict=True)
              for a, b in zip(x.sigma, y.sigma, strict=True))  # fmt: skip
    print(f"sigma differs by {gap:.1e} at most")
    assert gap < 1e-4


def test_more_is_tracked_as_the_answer_unrolls(golden: runtime.Runtime, eager: runtime.Runtime) -> None:
    """A sequence that begins with fewer positions than a layer may track."""
    options: dict[str, Any] = {"window": 1, "max_masks": 2, "track_num": 4, "gamma": 0.0, "drift": "head"}
    ours, theirs = (
        model.generate([41], gen_length=30, stop_at_eos=False, tokens_per_step=1, **options)
        for model in (golden, eager)
    )
    assert difference(recorded(ours), recorded(theirs)) is None and ours.sequence == theirs.sequence
    assert max(len(event.tracked) for event in ours.trace) > 3


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_oracle_agrees(golden: runtime.Runtime, options: dict[str, Any]) -> None:
    expected = Oracle.read(GOLDEN).elastic(PROMPT, 48, stop_at_eos=False, **{"threshold": None, **options})
    assert difference(recorded(run(golden, **options)), expected) is None


def test_a_horizon_beyond_the_answer_changes_nothing(golden: runtime.Runtime) -> None:
    assert run(golden, window=4, max_masks=48).trace[3].committed == run(golden, window=4).trace[3].committed
    assert run(golden, window=4, max_masks=96).sequence == run(golden, window=4).sequence


def test_masks_that_never_unrolled_stay_masks(golden: runtime.Runtime) -> None:
    """An EOS ends the answer before the rest of it is there."""
    likely = run(golden, window=4, max_masks=8).ids[2]
    out = golden.generate(PROMPT, gen_length=48, window=4, max_masks=8, eos_id=likely)
    assert len(out.sequence) == len(PROMPT) + 48 and out.sequence[-1] == golden.model.config.mask_id
    assert out.eos_at is not None and 0 < out.computed_fraction < 1


def test_the_window_reaches_no_further(golden: runtime.Runtime) -> None:
    out = run(golden, window=16, window_span=5, threshold=0.3)
    assert all(event.window[-1] < event.window[0] + 5 for event in out.trace)
    assert any(event.window[-1] - event.window[0] >= 5 for event in run(golden, window=16, threshold=0.3).trace)
    with refused(OptionError, "window_span", "positions", "0"):
        run(golden, window=8, window_span=0)


def test_too_near_a_horizon_is_refused(golden: runtime.Runtime) -> None:
    with refused(OptionError, "max_masks", "two windows", "8"):
        run(golden, window=8, max_masks=8)
