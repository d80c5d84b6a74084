"""A sequence on the GPU: passes that run to their end before anything is read, against passes layer by layer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import runtime
from tests.support.fake_gpu import fake_gpu
from tests.support.gpu_models import build_golden, device
from tests.support.runs import OPTIONS, PROMPT, decisions, sigma


@pytest.fixture(scope="module")
def golden_on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint, compiled by the fake. Read only."""
    return build_golden(tmp_path_factory.mktemp("runner") / "bundle")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "tensorrt"])
@pytest.mark.parametrize("options", OPTIONS[:6], ids=str)
def test_passes_that_run_ahead(
    golden_on_gpu: Path, backend: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running all layers first gives the tokens, sigmas and caches of stopping at the first drift."""
    with (
        fake_gpu(),
        runtime.load(golden_on_gpu, backend, **({} if backend == "tensorrt" else {"threads": 1})) as loaded,
    ):
        outs, caches = [], []
        make = loaded.model.new_runner
        for runs_ahead in (False, True):
            runners: list[Any] = []

            def new_runner(length: int, limit: int, runs_ahead: bool = runs_ahead, runners: list[Any] = runners) -> Any:
                runners.append(make(length, limit))
                runners[0].runs_ahead = runs_ahead
                return runners[0]

            monkeypatch.setattr(loaded.model, "new_runner", new_runner)
            outs.append(loaded.generate(PROMPT, gen_length=32, **options))
            caches.append(sequence_cache(runners[0]))
    gaps = [np.abs(a - b).max() for a, b in zip(*caches, strict=True)]
    print(f"{backend} {options}: caches differ by {max(gaps):.1e} at most")
    assert decisions(outs[0]) == decisions(outs[1])
    assert np.array_equal(sigma(outs[0]), sigma(outs[1])) and max(gaps) == 0


def sequence_cache(runner: Any) -> list[NDArray[np.float32]]:
    """H [L+1, positions, d], K and V [L, G, positions, D] of a sequence, by slot, without dummies."""
    layers = runner.config.layers
    if hasattr(runner, "cuda"):
        real = np.flatnonzero(runner.control["key_mask"])
        kv = [runner.cuda.at(runner.caches.at(n, 0, 0), layers * runner.caches.size(n)).view(np.float32) for n in "kv"]
        shaped = [x.reshape(layers, runner.config.kv_heads, runner.slots, -1)[:, :, real] for x in kv]
    else:
        real = np.arange(runner.length)
        shaped = [np.asarray(x)[:, 0][:, :, real] for x in (runner.k, runner.v)]
    return [*(runner.hidden(i, runner.slots)[real] for i in range(layers + 1)), *shaped]


def test_a_reuse_step_waits_once(golden_on_gpu: Path) -> None:
    """Nothing drifts at gamma 0: after the first pass, the warm-up and the capture, a step is one launch, one wait."""
    with fake_gpu(), runtime.load(golden_on_gpu, "tensorrt") as model:
        _, cuda = device(model)
        seen = []
        for _ in model.stream(PROMPT, gen_length=32, gamma=0.0, window=8):
            seen.append((cuda.waits, cuda.counts["launch"], cuda.counts["upload"], cuda.counts["download"]))
    steps = np.diff(np.array(seen), axis=0)[2:-1]
    assert len(steps) > 4 and (steps == [1, 1, 1, 1]).all(), steps
