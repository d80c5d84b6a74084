"""The TensorRT back end on a stand-in for GPU and runtime (see `fake_gpu`)."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import export
import runtime
from engines.bundle import Bundle
from engines.errors import BackendError, BundleError, DeviceError, OptionError
from engines.gpu.buffers import cycles, narrow, widen
from engines.trt import package as flavour
from engines.trt.model import TensorRTModel
from export.verify import verify
from runtime.decoding.generate import Output
from tests.support.cases import GOLDEN, refused
from tests.support.fake_gpu import VERSION, FakeCuda, fake_gpu, module

PROMPT = np.arange(1, 25)
OPTIONS: list[dict[str, Any]] = [
    {"gamma": 0.9}, {"gamma": 0.999, "window": 8}, {"gamma": 0.5, "window": 8, "drift": "head"},
    {"gamma": 0.99, "window": 8, "refresh_scope": "near"}, {"gamma": 0.99, "window": 8, "block_caching": False},
    {"gamma": 0.99, "window": 4, "max_masks": 8},
    {"gamma": 0.99, "window": 8, "drift": "head", "track_num": 1},
    {"gamma": 0.95, "track_num": 2, "temperature": 0.7, "seed": 3},
    {"policy": "full"}, {"policy": "prefix"}, {"policy": "dual"}, {"policy": "interval"},
]  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint in fp32, compiled by the stand-in. Read only."""
    with fake_gpu():
        out = tmp_path_factory.mktemp("tensorrt") / "bundle"
        return export.build(GOLDEN, out, backends=["all"], window=32, track_num=2)


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[runtime.Runtime]:
    with fake_gpu():
        loaded = runtime.load(bundle, "tensorrt")
    with loaded:
        yield loaded


@pytest.fixture(scope="module")
def reference(bundle: Path) -> Iterator[runtime.Runtime]:
    with runtime.load(bundle, "onnxruntime", threads=1) as loaded:
        yield loaded


def cuda_of(model: runtime.Runtime) -> FakeCuda:
    assert isinstance(model.model, TensorRTModel) and isinstance(model.model.cuda, FakeCuda)
    return model.model.cuda


def decisions(out: Output) -> list[Any]:
    return [(e.active, e.trigger, e.window, e.committed, e.tokens, e.tracked, e.rows) for e in out.trace]


def sigma(out: Output) -> NDArray[np.float64]:
    return np.concatenate([[0.0], *(event.sigma for event in out.trace)])


# The session: same numbers, same decisions, one wait


def test_plain_forward(model: runtime.Runtime, reference: runtime.Runtime) -> None:
    gap = np.abs(model.logits(PROMPT) - reference.logits(PROMPT))
    print(f"logits against ONNX Runtime: max {gap.max():.1e} mean {gap.mean():.1e}")
    assert gap.max() < 1e-5


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_decides_as_onnxruntime_does(
    model: runtime.Runtime, reference: runtime.Runtime, options: dict[str, Any]
) -> None:
    ours, theirs = (m.generate(PROMPT, gen_length=32, **options) for m in (model, reference))
    gap = np.abs(sigma(ours) - sigma(theirs))
    print(f"{options}: {ours.steps} steps, sigma max {gap.max():.1e} mean {gap.mean():.1e}")
    assert decisions(ours) == decisions(theirs) and ours.sequence == theirs.sequence
    assert gap.max() < 1e-5


def test_a_reuse_step_waits_once(model: runtime.Runtime) -> None:
    """Nothing drifts at gamma 0: after the first pass, the warm-up and the capture, a step is one launch, one wait."""
    cuda = cuda_of(model)
    seen = []
    for _ in model.stream(PROMPT, gen_length=32, gamma=0.0, window=8):
        seen.append((cuda.waits, cuda.counts["launch"], cuda.counts["upload"], cuda.counts["download"]))
    steps = np.diff(np.array(seen), axis=0)[2:-1]
    assert len(steps) > 4 and (steps == [1, 1, 1, 1]).all(), steps


def test_memory_serves_one_sequence_after_the_other(model: runtime.Runtime) -> None:
    first = model.generate(PROMPT, gen_length=32)
    held = len(cuda_of(model).owned)
    other = model.generate(PROMPT[::-1].copy(), gen_length=16)
    again = model.generate(PROMPT, gen_length=32)
    assert other.sequence != first.sequence and decisions(again) == decisions(first)
    assert len(cuda_of(model).owned) == held


def test_verify_compares_every_part(bundle: Path) -> None:
    with fake_gpu():
        rows = {row.part: row.max for row in verify(Bundle.open(bundle), "tensorrt", 5e-4)}
    assert {"embed", "layer_00", "head", "drift_row", "drift_head", "probe", "forward"} <= set(rows)


# Optimistic against layer by layer, where both can be run


@pytest.mark.parametrize("backend", ["eager", "tensorrt"])
@pytest.mark.parametrize("options", OPTIONS[:6], ids=str)
def test_optimistic_walk(bundle: Path, backend: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Running all layers before looking gives the tokens, drift numbers and caches of stopping at the first drift."""
    with fake_gpu(), runtime.load(bundle, backend, **({} if backend == "tensorrt" else {"threads": 1})) as loaded:
        outs, caches = [], []
        make = loaded.model.new_runner
        for optimistic in (False, True):
            runners: list[Any] = []

            def new_runner(length: int, limit: int, optimistic: bool = optimistic, runners: list[Any] = runners) -> Any:
                runners.append(make(length, limit))
                runners[0].optimistic = optimistic
                return runners[0]

            monkeypatch.setattr(loaded.model, "new_runner", new_runner)
            outs.append(loaded.generate(PROMPT, gen_length=32, **options))
            caches.append(cache(runners[0]))
    gaps = [np.abs(a - b).max() for a, b in zip(*caches, strict=True)]
    print(f"{backend} {options}: caches differ by {max(gaps):.1e} at most")
    assert decisions(outs[0]) == decisions(outs[1])
    assert np.array_equal(sigma(outs[0]), sigma(outs[1])) and max(gaps) == 0


def cache(runner: Any) -> list[NDArray[np.float32]]:
    """H of every layer, K and V of the sequence's slots; dummies hold what they may."""
    layers = runner.config.layers
    if hasattr(runner, "cuda"):
        real = np.flatnonzero(runner.control["key_mask"])
        kv = [runner.cuda.at(runner.caches.at(n, 0, 0), layers * runner.caches.size(n)).view(np.float32) for n in "kv"]
        shaped = [x.reshape(layers, runner.config.kv_heads, runner.slots, -1)[:, :, real] for x in kv]
    else:
        real = np.arange(runner.length)
        shaped = [np.asarray(x)[:, 0][:, :, real] for x in (runner.k, runner.v)]
    return [*(runner.hidden(i, runner.slots)[real] for i in range(layers + 1)), *shaped]


# What is refused


def test_no_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without a driver the back end says so, and `auto` takes ONNX Runtime and says why."""
    cuda = pytest.importorskip("cuda.bindings.runtime")
    monkeypatch.setattr(cuda, "cudaGetDeviceCount", lambda: (cuda.cudaError_t.cudaErrorNoDevice, None))
    with refused(DeviceError, "no NVIDIA GPU 0", "install its driver", "--backend onnxruntime"):
        runtime.load(bundle, "tensorrt")
    with runtime.load(bundle) as loaded:
        assert loaded.backend == "onnxruntime" and "tensorrt is passed over: no NVIDIA GPU" in caplog.text


def test_another_compute_capability(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = FakeCuda.__init__

    def turing(self: FakeCuda, device: int = 0) -> None:
        real(self, device)
        self.capability = (7, 5)

    monkeypatch.setattr(FakeCuda, "__init__", turing)
    with fake_gpu():
        with refused(DeviceError, "built for compute capability 8.0, 8.6", "has 7.5", "--capability 7.5"):
            runtime.load(bundle, "tensorrt")
        with runtime.load(bundle) as loaded:
            assert loaded.backend == "onnxruntime" and "7.5" in caplog.text


def test_plans_of_another_version(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu():
        monkeypatch.setattr(module_now(), "__version__", "99.0")
        with refused(BundleError, f"built by tensorrt {VERSION}", "tensorrt 99.0 is installed", "export build"):
            runtime.load(bundle, "tensorrt")


def module_now() -> Any:
    import tensorrt  # type: ignore[import-not-found]

    return tensorrt


def test_out_of_memory(bundle: Path) -> None:
    """A sequence that does not fit gives back what it took; the model stays usable."""
    with fake_gpu(), runtime.load(bundle, "tensorrt") as loaded:
        cuda = cuda_of(loaded)
        held, cuda.limit = list(cuda.owned), sum(r.size for r in cuda.regions.values()) + 100_000
        with refused(BackendError, "out of GPU memory"):
            loaded.generate(PROMPT, gen_length=8)
        assert cuda.owned == held
        cuda.limit = 1 << 30
        assert loaded.generate(PROMPT, gen_length=8).tokens >= 0


def test_weights_that_do_not_fit(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was loaded before the GPU was full is given back."""
    real = FakeCuda.__init__

    def small(self: FakeCuda, device: int = 0) -> None:
        real(self, device)
        self.limit = 100_000

    monkeypatch.setattr(FakeCuda, "__init__", small)
    with fake_gpu(), refused(BackendError, "out of GPU memory", "layer_00"):
        runtime.load(bundle, "tensorrt")
    assert not FakeCuda.latest.owned and not FakeCuda.latest.regions


def test_no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(OptionError, "unknown TensorRT package 'cuda'", "tensorrt, tensorrt_rtx"):
        flavour.find("cuda")
    monkeypatch.setattr("engines.trt.package.importlib.import_module", lambda name: __import__("no_such_" + name))
    with refused(BackendError, "TensorRT is not installed", "pip install 'elastic-diffusion[rtx]'"):
        flavour.find()


# Small things


@given(st.permutations(range(9)))
def test_cycles_carry_out_a_permutation(source: list[int]) -> None:
    rows = np.arange(9) * 10
    expected = rows[source]
    for cycle in cycles(np.arange(9), np.array(source)):
        spare = rows[cycle[0]]
        for to, where in pairwise(cycle):
            rows[to] = rows[where]
        rows[cycle[-1]] = spare
    assert (rows == expected).all()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_halves_there_and_back(precision: str) -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    half = torch.from_numpy(values).to(torch.float16 if precision == "fp16" else torch.bfloat16)
    raw = narrow(values, precision)
    assert raw.tobytes() == half.view(torch.int16).numpy().tobytes()
    assert np.array_equal(widen(raw.view(np.uint8), precision), half.float().numpy())


def test_the_stand_in_keeps_the_rules() -> None:
    """What it would not notice it could not prove."""
    cuda = FakeCuda()
    address = cuda.alloc(16, "a test")
    with pytest.raises(AssertionError, match="no allocation"):
        cuda.at(address + 8, 16)
    with pytest.raises(AssertionError, match="captured"):
        cuda.capture(cuda.sync)
    host = np.zeros(4, np.float32)
    cuda.upload(address, np.ones(4, np.float32))
    cuda.download(host, address)
    assert not host.any()
    cuda.sync()
    assert host.all() and module().__version__ == VERSION
