"""The TensorRT back end on the fake GPU: the decisions of ONNX Runtime, and what is refused."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from engines.bundle import Bundle
from engines.errors import BackendError, BundleError, DeviceError
from export.verify import verify
from tests.support.cases import refused
from tests.support.fake_gpu import VERSION, FakeCuda, fake_gpu
from tests.support.gpu_models import device
from tests.support.runs import OPTIONS, PROMPT, decisions, sigma


def test_plain_forward(model: runtime.Runtime, reference: runtime.Runtime) -> None:
    gap = np.abs(model.logits(PROMPT) - reference.logits(PROMPT))
    print(f"logits against ONNX Runtime: max {gap.max():.1e} mean {gap.mean():.1e}")
    assert gap.max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_decides_as_onnxruntime_does(
    model: runtime.Runtime, reference: runtime.Runtime, options: dict[str, Any]
) -> None:
    ours, theirs = (m.generate(PROMPT, gen_length=32, **options) for m in (model, reference))
    gap = np.abs(sigma(ours) - sigma(theirs))
    print(f"{options}: {ours.steps} steps, sigma max {gap.max():.1e} mean {gap.mean():.1e}")
    assert decisions(ours) == decisions(theirs) and ours.sequence == theirs.sequence
    assert gap.max() < 1e-5


@pytest.mark.slow
def test_memory_serves_one_sequence_after_the_other(model: runtime.Runtime) -> None:
    first = model.generate(PROMPT, gen_length=32)
    held = len(device(model)[1].owned)
    other = model.generate(PROMPT[::-1].copy(), gen_length=16)
    again = model.generate(PROMPT, gen_length=32)
    assert other.sequence != first.sequence and decisions(again) == decisions(first)
    assert len(device(model)[1].owned) == held


def test_verify_compares_every_part(bundle: Path) -> None:
    with fake_gpu():
        rows = {row.part: row.max for row in verify(Bundle.open(bundle), "tensorrt", 5e-4)}
    assert {"embed", "layer_00", "head", "drift_row", "drift_head", "probe", "forward"} <= set(rows)


# What is refused


def test_no_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without a driver the error names it, and `auto` takes ONNX Runtime and a warning says why."""
    cuda = pytest.importorskip("cuda.bindings.runtime")
    monkeypatch.setattr(cuda, "cudaGetDeviceCount", lambda: (cuda.cudaError_t.cudaErrorNoDevice, None))
    with refused(DeviceError, "no NVIDIA GPU 0", "install its driver", "--backend onnxruntime"):
        runtime.load(bundle, "tensorrt")
    with runtime.load(bundle) as loaded:
        assert loaded.backend == "onnxruntime" and "not using tensorrt: no NVIDIA GPU" in caplog.text


@pytest.mark.parametrize(
    ("capability", "parts"),
    [
        ((7, 5), ("built for compute capability 8.0, 8.6", "has 7.5", "--capability 7.5")),
        ((9, 0), ("does not run on Fake GPU", "compute capability 9.0 (it runs on 7.5, 8.0", "--flavour tensorrt")),
    ],
    ids=str,
)
def test_another_compute_capability(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capability: tuple[int, int],
    parts: tuple[str, ...],
) -> None:  # fmt: skip
    """Engines for newer GPUs only, and a GPU that tensorrt_rtx refuses whatever it was built for, as Hopper."""
    real = FakeCuda.__init__

    def other(self: FakeCuda, device: int = 0) -> None:
        real(self, device)
        self.capability = capability

    monkeypatch.setattr(FakeCuda, "__init__", other)
    with fake_gpu():
        with refused(DeviceError, *parts):
            runtime.load(bundle, "tensorrt")
        with runtime.load(bundle) as loaded:
            assert loaded.backend == "onnxruntime" and f"{capability[0]}.{capability[1]}" in caplog.text


def test_engines_of_another_version(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu():
        monkeypatch.setattr(importlib.import_module("tensorrt"), "__version__", "99.0")
        with refused(BundleError, f"built by tensorrt {VERSION}", "tensorrt 99.0 is installed", "export build"):
            runtime.load(bundle, "tensorrt")


def test_out_of_memory(bundle: Path) -> None:
    """The memory of a sequence that does not fit is freed; the model stays usable."""
    with fake_gpu(), runtime.load(bundle, "tensorrt") as loaded:
        cuda = device(loaded)[1]
        held, cuda.limit = list(cuda.owned), sum(r.size for r in cuda.regions.values()) + 100_000
        with refused(BackendError, "out of GPU memory"):
            loaded.generate(PROMPT, gen_length=8)
        assert cuda.owned == held
        cuda.limit = 1 << 30
        assert loaded.generate(PROMPT, gen_length=8).tokens >= 0


def test_weights_that_do_not_fit(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights that were loaded before the GPU was full are freed."""
    real = FakeCuda.__init__

    def small(self: FakeCuda, device: int = 0) -> None:
        real(self, device)
        self.limit = 100_000

    monkeypatch.setattr(FakeCuda, "__init__", small)
    with fake_gpu(), refused(BackendError, "out of GPU memory", "layer_00"):
        runtime.load(bundle, "tensorrt")
    assert not FakeCuda.latest.owned and not FakeCuda.latest.regions
