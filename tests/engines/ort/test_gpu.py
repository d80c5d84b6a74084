"""ONNX Runtime on a GPU, on the fake: the decisions of the CPU, and one wait for each reuse pass."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import export
import runtime
from engines.errors import DeviceError, OptionError
from engines.ort.gpu import OnnxRuntimeGpuModel, load_libraries
from tests.support.cases import GOLDEN, refused
from tests.support.fake_gpu import FakeCuda, GpuSession, fake_provider
from tests.support.runs import OPTIONS, PROMPT, decisions, sigma


@pytest.fixture(scope="module")
def model(golden_bundle: Path) -> Iterator[runtime.Runtime]:
    with fake_provider():
        loaded = runtime.load(golden_bundle, "onnxruntime")
    with loaded:
        assert isinstance(loaded.model, OnnxRuntimeGpuModel)
        yield loaded


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_decides_as_on_the_cpu(model: runtime.Runtime, golden: runtime.Runtime, options: dict[str, Any]) -> None:
    ours, theirs = (m.generate(PROMPT, gen_length=32, **options) for m in (model, golden))
    gap = np.abs(sigma(ours) - sigma(theirs))
    print(f"{options}: {ours.steps} steps, sigma max {gap.max():.1e} mean {gap.mean():.1e}")
    assert decisions(ours) == decisions(theirs) and ours.sequence == theirs.sequence
    assert gap.max() < 1e-5


def test_plain_forward(model: runtime.Runtime, golden: runtime.Runtime) -> None:
    assert np.abs(model.logits(PROMPT) - golden.logits(PROMPT)).max() < 1e-5


def test_a_reuse_step_waits_once(model: runtime.Runtime) -> None:
    assert isinstance(model.model, OnnxRuntimeGpuModel) and isinstance(model.model.cuda, FakeCuda)
    cuda = model.model.cuda
    seen = [(cuda.waits, cuda.counts["upload"]) for _ in model.stream(PROMPT, gen_length=32, gamma=0.0, window=8)]
    steps = np.diff(np.array(seen), axis=0)[2:-1]
    assert len(steps) > 4 and (steps == 1).all(), steps


def test_choice_of_a_provider(golden_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with refused(DeviceError, "no cuda provider", "CPUExecutionProvider", "onnxruntime-gpu"):
        runtime.load(golden_bundle, "onnxruntime", provider="cuda")
    with refused(OptionError, "unknown provider 'rocm'", "auto, cpu, cuda"):
        runtime.load(golden_bundle, "onnxruntime", provider="rocm")
    with refused(OptionError, "eager takes no option provider (it takes threads, device)", "leave it out"):
        runtime.load(golden_bundle, "eager", provider="cuda")
    with refused(OptionError, "provider cuda takes no threads", "leave threads out"):
        runtime.load(golden_bundle, "onnxruntime", provider="cuda", threads=1)
    with refused(OptionError, "TensorRT provider is not used", "use --backend tensorrt"):
        runtime.load(golden_bundle, "onnxruntime", provider="tensorrt")
    with fake_provider():
        with runtime.load(golden_bundle, "onnxruntime", provider="cpu", threads=1) as loaded:
            assert "CPU, 1 threads" in loaded.model.device and not caplog.text
        with runtime.load(golden_bundle, "onnxruntime", threads=1) as loaded:
            assert "CPU" in loaded.model.device and "not using the GPU: threads" in caplog.text
        halves = export.build(GOLDEN, tmp_path / "bf16", precision="bf16", window=8)
        with refused(OptionError, "bind no bf16", "--fp16"):
            runtime.load(halves, "onnxruntime", provider="cuda")


def test_a_release_without_the_kernels(golden_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused with the release that has them, or left for the CPU with a warning, before a session opens."""
    monkeypatch.setattr(ort, "__version__", "1.26.0")
    with fake_provider(), refused(DeviceError, "1.26.0 lacks kernels", "onnxruntime-gpu>=1.27", "--provider cpu"):
        runtime.load(golden_bundle, "onnxruntime", provider="cuda")


def test_a_graph_that_the_provider_refuses(golden_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "This session contains graph nodes that are assigned to the default CPU EP"

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : {reason}\nmore")

    with fake_provider():
        monkeypatch.setattr(ort, "InferenceSession", refuse)
        with refused(DeviceError, "cannot run embed with its cuda provider", reason, "update onnxruntime-gpu"):
            runtime.load(golden_bundle, "onnxruntime", provider="cuda")


def test_the_fake_refuses_what_the_provider_would(golden_bundle: Path, tmp_path: Path) -> None:
    """Nodes may not fall to the CPU: by an option that is missing, or for arithmetic on a shape."""
    cuda, options = FakeCuda(), ort.SessionOptions()
    settings = {"user_compute_stream": "7", "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
    graph = golden_bundle / "onnx/tests_row.onnx"
    with pytest.raises(RuntimeError, match="disable_cpu_ep_fallback"):
        GpuSession(cuda, str(graph), options, settings)
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    GpuSession(cuda, str(graph), options, settings)
    model = onnx.load(str(graph))
    (taken,) = (node for node in model.graph.node if node.op_type == "Shape" and node.attribute)
    double = onnx.helper.make_node("Add", [taken.output[0], taken.output[0]], ["double"], name="double")
    model.graph.node.append(double)
    onnx.save(model, str(tmp_path / "graph.onnx"))
    with pytest.raises(AssertionError, match="fall to the CPU"):
        GpuSession(cuda, str(tmp_path / "graph.onnx"), options, settings)


def test_a_gpu_that_is_not_there(
    golden_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A CUDA build of ONNX Runtime on a machine without a GPU: the CPU is used, and a warning says so."""
    cuda = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python; scripts/setup.sh installs it")
    monkeypatch.setattr(cuda, "cudaGetDeviceCount", lambda: (cuda.cudaError_t.cudaErrorNoDevice, None))
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    with runtime.load(golden_bundle, "onnxruntime") as loaded:
        assert "CPU" in loaded.model.device and "not using the GPU: no NVIDIA GPU" in caplog.text


def test_what_the_loading_of_libraries_prints_is_logged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("no libcublas"), raising=False)
    with caplog.at_level("INFO"):
        load_libraries()
    assert "no libcublas" in caplog.text and not capsys.readouterr().out
