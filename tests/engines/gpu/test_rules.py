"""The rules of CUDA and TensorRT that docs/GPU.md lists, each with what this project does about it."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import runtime
from engines.errors import BackendError
from engines.gpu.cuda import ALIGNMENT, Cuda
from engines.gpu.executor import ANY, GENERAL, REUSE
from engines.gpu.staging import ResultBuffer
from engines.trt import contexts
from engines.trt.model import TensorRTModel
from tests.engines.gpu.test_cuda import without_gpu
from tests.support.cases import refused
from tests.support.fake_gpu import Context, FakeCuda, RuntimeCache, fake_gpu
from tests.support.gpu_models import RAGGED, batch_of, device

PROMPT, LENGTH = list(range(5, 25)), 24


@pytest.fixture
def model(bundle: Path) -> Iterator[runtime.Runtime]:
    with fake_gpu(), runtime.load(bundle, "tensorrt") as loaded:
        yield loaded


def tensorrt(model: runtime.Runtime) -> TensorRTModel:
    assert isinstance(model.model, TensorRTModel)
    return model.model


# Memory


def test_scratch_is_that_of_the_profile_in_use(model: runtime.Runtime) -> None:
    """A reuse pass takes its own; the largest profile is paid for when it runs, and not before."""
    made = tensorrt(model)
    slots = made.slots_for_length(LENGTH)
    engines = {part: made.engine(part, slots) for part in ("layer_00", "tests_row", "head")}
    for engine in engines.values():
        engine.context(REUSE, 1)
    fixed = max(engine.engine.get_device_memory_size_for_profile_v2(REUSE) for engine in engines.values())
    assert made.scratch.size == fixed < min(e.engine.device_memory_size_v2 for e in engines.values())
    engines["layer_00"].context(GENERAL, 1)
    assert made.scratch.size == engines["layer_00"].engine.get_device_memory_size_for_profile_v2(GENERAL)


def test_results_lie_at_aligned_addresses() -> None:
    for batch in (1, 3, 80):
        result = ResultBuffer(FakeCuda(), batch=batch, layers=3, track_num=5, rows=7)
        lines = [result.line(name, layer) for name in ("sigma", "probe") for layer in range(3)]
        assert all(line % ALIGNMENT == 0 for line in (*lines, *result.address.values()))
        assert len(set(lines)) == 6 and result["sigma"].shape[1] >= batch


def test_every_address_is_aligned(model: runtime.Runtime) -> None:
    """All that a run binds, of one sequence and of a batch in which sequences move; the fake looks at each."""
    model.generate_batch([np.array(prompt) for prompt in RAGGED], gen_length=16)
    model.generate(PROMPT, gen_length=LENGTH)
    assert device(model)[1].counts["run"] > 100


# Graphs


def test_a_failed_capture_runs_uncaptured(model: runtime.Runtime, caplog: pytest.LogCaptureFixture) -> None:
    expected = model.generate(PROMPT, gen_length=LENGTH)
    batch_of(model).release()
    tensorrt(model).batches.clear()
    _, cuda = device(model)
    cuda.fails_captures, before = True, cuda.counts["capture"]
    with caplog.at_level(logging.WARNING):
        out = model.generate(PROMPT, gen_length=LENGTH)
    assert out.sequence == expected.sequence and out.steps > 3
    assert cuda.counts["capture"] == before + 1, "a key is tried once"
    (said,) = (record.getMessage() for record in caplog.records if "CUDA graph" in record.getMessage())
    assert "operation not permitted when stream is capturing" in said


def test_a_context_that_cannot_be_captured(model: runtime.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX is asked before; without its leave the pass runs as it is queued."""
    monkeypatch.setattr(Context, "is_stream_capturable", lambda *_: False)
    model.generate(PROMPT, gen_length=LENGTH)
    queue = batch_of(model).runners[0].pass_queue
    assert queue.uncaptured and not any(queue.graphs.values())


def test_contexts_are_of_one_place(model: runtime.Runtime) -> None:
    """A captured graph needs its contexts' addresses: each layer has its own, and nothing is bound again."""
    model.generate(PROMPT, gen_length=LENGTH)
    made = tensorrt(model)
    engine = made.engine("tests_row", next(iter(made.batches)))
    keys: Any = engine.contexts
    layers = {key[2][1] for key in keys}
    assert layers == set(range(made.config.layers))


def test_reuse_is_compiled_before_it_is_captured(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the default, a graph would keep fallback kernels."""
    monkeypatch.setattr(contexts, "REUSE", -1)
    with fake_gpu(), runtime.load(bundle, "tensorrt") as model:
        with pytest.raises(AssertionError, match="fallback kernels"):
            model.generate(PROMPT, gen_length=LENGTH)
        device(model)[1].queue.clear()


def test_compiled_kernels_are_kept(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the user's cache folder, by GPU, version and bundle; the second start loads them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loads: list[bytes] = []

    def deserialize(self: RuntimeCache, content: bytes) -> bool:
        loads.append(content)
        return True

    monkeypatch.setattr(RuntimeCache, "deserialize", deserialize)
    for count in range(3):
        with fake_gpu(), runtime.load(bundle, "tensorrt") as model:
            model.generate(PROMPT, gen_length=4)
            identity = model.bundle.identity
        assert len(loads) == count
    (file,) = (tmp_path / "cache" / "elastic-diffusion").iterdir()
    assert (
        all(part in file.name for part in ("Fake-GPU", "8.9", "99.0.fake", identity)) and file.read_bytes() == loads[0]
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # a file, in which nothing can be written
    with fake_gpu(), caplog.at_level(logging.INFO), runtime.load(bundle, "tensorrt") as model:
        model.generate(PROMPT, gen_length=4)
    assert any("not kept" in record.getMessage() for record in caplog.records)


# The end


def test_what_is_left_at_the_end(bundle: Path) -> None:
    """Wait, graphs, contexts, memory: after an answer, an interruption in a pass, and an error that is kept."""
    for stop in (None, KeyboardInterrupt, BackendError):
        with fake_gpu(), runtime.load(bundle, "tensorrt") as model:
            _, cuda = device(model)
            if stop is None:
                model.generate(PROMPT, gen_length=LENGTH)
                assert cuda.graphs
                continue
            engine: Any = tensorrt(model).engine("layer_01", tensorrt(model).slots_for_length(LENGTH + len(PROMPT)))

            def fails(*_: Any, stop: type[BaseException] = stop) -> None:
                raise stop("now")

            engine.run = fails
            with pytest.raises(stop) as kept:
                model.generate(PROMPT, gen_length=LENGTH)
        assert kept.traceback and not cuda.owned and not cuda.graphs and not len(cuda.contexts)


def test_a_context_is_not_destroyed_under_its_work(model: runtime.Runtime) -> None:
    """The fake notices it."""
    made, cuda = tensorrt(model), device(model)[1]
    made.engine("head", made.slots_for_length(LENGTH)).context(ANY, 1)
    cuda.push(lambda: None)
    made.free_engines()
    assert cuda.broken == ["a context was destroyed with work queued"]
    cuda.broken.clear()


# Calls of CUDA's runtime API


def api(**functions: Any) -> Cuda:
    """A `Cuda` on functions that return a status and a result."""
    success = SimpleNamespace(cudaSuccess=0)
    modes = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    names = {"cudaGetErrorString": lambda status: (0, b"stream capture invalidated")}
    return without_gpu(cudaError_t=success, cudaStreamCaptureMode=modes, **names, **functions)


def test_the_first_error_of_a_capture_is_kept() -> None:
    """Ending a broken capture fails too, with error 901; and a graph that it leaves is destroyed."""
    for end, destroyed in (((901, None), []), ((0, "partial"), ["partial"])):
        seen: list[Any] = []
        cuda = api(
            cudaStreamBeginCapture=lambda *_: (0,),
            cudaStreamEndCapture=lambda _, end=end: end,
            cudaGraphDestroy=seen.append,
        )

        def work() -> None:
            raise BackendError("TensorRT failed on layer_00")

        with refused(BackendError, "TensorRT failed on layer_00"):
            cuda.capture(work)
        assert seen == destroyed and not cuda.capturing


def test_the_device_is_set_in_every_thread() -> None:
    seen: list[tuple[int, int]] = []

    def set_device(number: int) -> tuple[int]:
        seen.append((threading.get_ident(), number))
        return (0,)

    cuda = api(cudaSetDevice=set_device, cudaStreamSynchronize=lambda stream: (0,))
    cuda.device, cuda.thread, cuda.waits = 3, 0, 0
    cuda.sync()
    cuda.sync()
    thread = threading.Thread(target=cuda.sync)
    thread.start()
    thread.join()
    assert [number for _, number in seen] == [3, 3] and len({ident for ident, _ in seen}) == 2


def test_the_stream_does_not_wait_for_the_legacy_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime_api = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python; scripts/setup.sh installs it")
    seen = []

    def call(self: Cuda, name: str, *arguments: Any) -> Any:
        seen.append((name, *arguments))
        return SimpleNamespace(name=b"GPU", major=9, minor=0) if name == "cudaGetDeviceProperties" else 5

    monkeypatch.setattr(runtime_api, "cudaGetDeviceCount", lambda: (runtime_api.cudaError_t.cudaSuccess, 1))
    monkeypatch.setattr(Cuda, "call", call)
    assert Cuda().stream == 5
    assert ("cudaStreamCreateWithFlags", runtime_api.cudaStreamNonBlocking) in seen


def test_rows_too_far_apart_for_a_strided_copy() -> None:
    """Up to the largest pitch one call, beyond it one for each row."""
    seen: list[tuple[str, int]] = []
    cuda = api()
    cuda.api.cudaMemcpyKind = SimpleNamespace(cudaMemcpyDeviceToDevice=3)
    cuda.call = lambda name, target, *_: seen.append((name, target))  # type: ignore[method-assign,assignment]
    cuda.copy_rows(0, 2**31 - 1, 8, 64, 4, 3)
    cuda.copy_rows(0, 2**31, 8, 64, 4, 3)
    assert [name for name, _ in seen] == ["cudaMemcpy2DAsync", *["cudaMemcpyAsync"] * 3]
    assert [target for _, target in seen[1:]] == [0, 2**31, 2**32]
