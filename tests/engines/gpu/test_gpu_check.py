"""The figures of `scripts/gpu_check.py`, on the fake GPU."""

import pytest

import runtime
from scripts.gpu.batches import batch_figures


@pytest.mark.slow
def test_the_figures_of_a_gpu_check(model: runtime.Runtime) -> None:
    """The measurement of batches runs: every size, equal tokens, and a size that the engines do not take."""
    found = batch_figures(model, (1, 2, 4), 80, 4, 6)
    print(found)
    for size in ("1", "2", "4"):
        assert found[size]["reuse_ms"] > 0
        for case in found[size]["decoding"]:
            assert case["equal_to_alone"] == 4 == case["sequences"] and case["tokens_per_second"] > 0
    assert batch_figures(model, (9,), 80, 4, 6)["9"].startswith("TensorRT refuses ids (9, ")
