"""The runner on the CPU: the reuse graph gives what a run a layer gives."""

from pathlib import Path
from typing import Any, cast

import numpy as np

import runtime
from engines.errors import BackendError
from engines.ort.model import OnnxRuntimeModel
from engines.ort.runner import OnnxRuntimeRunner
from engines.runner import DriftInputs
from tests.support.cases import refused

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def test_a_run_that_fails_is_one_sentence(golden: runtime.Runtime) -> None:
    """Rows out of range: the error of a run on bound values is translated, too."""
    runner: Any = golden.model.new_runner(6)
    runner.embed(np.arange(6))
    with refused(BackendError, "ONNX Runtime failed on layer_00", "python -m export verify"):
        runner._run(3, 0, 1, tracked=np.array([5]), window=np.array([5]), output_rows=np.arange(3))


def test_the_reuse_graph(golden_bundle: Path) -> None:
    """One run of all layers leaves the same caches, sigmas and tracked tokens as a run a layer."""
    length, rng = 90, np.random.default_rng(0)
    ids, changed = rng.integers(0, 250, (2, length))
    drift_inputs = DriftInputs("row", np.array([3, 20]), np.arange(4, 20), np.arange(length) % 3 > 0, np.arange(4, 20))
    found = []
    for together in (True, False):
        with runtime.load(golden_bundle, "onnxruntime", threads=1) as model:
            if not together:
                del cast(OnnxRuntimeModel, model.model).sessions["reuse"]
            runner = cast(OnnxRuntimeRunner, model.model.new_runner(length))
            runner.embed(ids)
            runner.run_layers(length, drift_inputs)
            runner.permute(np.array([0, 1, 50, 60]), np.array([50, 60, 0, 1]))
            runner.embed(changed[:24])
            outcome = runner.reuse(24, drift_inputs, 0.0)
            found.append(({"h": runner.h, "q": runner.q, "k": runner.k, "v": runner.v}, outcome))
            assert model.model.runs["reuse"] == together
    (ours, one), (theirs, other) = found
    for name, cache in ours.items():
        gap = np.abs(cache - theirs[name])
        print(f"{name}: max {gap.max():.2e} mean {gap.mean():.2e}")
        assert gap.max() < 1e-4
    print("sigma", np.abs(np.array(one.sigma) - other.sigma).max())
    assert np.allclose(one.sigma, other.sigma, atol=1e-6) and max(one.sigma) < 1, "drift is seen, not written over"
    assert np.array_equal(one.probes, other.probes)
