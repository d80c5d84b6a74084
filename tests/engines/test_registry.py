"""Finding and loading back ends: what is missing is named, and an option that is not taken is refused."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

import export
import runtime
from engines import registry as backends
from engines.bundle import Bundle
from engines.errors import BackendError, BundleError, OptionError
from engines.ort.model import OnnxRuntimeModel
from engines.registry import BACKENDS, available
from tests.support.cases import refused

ON_CPU = ("onnxruntime", "eager")
TENSORRT = ("tensorrt", "tensorrt_rtx")


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make packages look as if they were not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name.split(".")[0] in packages else real(name, *a)
    )


# Which back end


def test_the_preferred_one(golden_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, *TENSORRT)
    assert available() == ["onnxruntime", "eager"]
    with runtime.load(golden_bundle) as model:
        assert model.backend == "onnxruntime" and "CPU, 1 threads, onnxruntime" in model.model.device


def test_none_installed(golden_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "onnxruntime", "torch", *TENSORRT)
    assert available() == []
    with refused(BackendError, "no back end is installed", "pip install 'elastic-diffusion[cpu]'"):
        runtime.load(golden_bundle)
    for name, package, extra in (
        ("onnxruntime", "onnxruntime", "cpu"),
        ("eager", "torch", "export"),
        ("tensorrt", "tensorrt or tensorrt_rtx", "gpu"),
    ):
        with refused(BackendError, name, f"needs {package}", f"pip install 'elastic-diffusion[{extra}]'"):
            runtime.load(golden_bundle, name)


def test_the_next_one(golden_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "onnxruntime")
    with runtime.load(golden_bundle, threads=1) as model:
        assert model.backend == "eager"


def test_a_package_that_does_not_import(golden_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "eager", replace(BACKENDS["eager"], module="engines.no_such_module"))
    with refused(BackendError, "eager does not load", "no_such_module", "pip install 'elastic-diffusion[export]'"):
        runtime.load(golden_bundle, "eager")


def test_unknown(golden_bundle: Path) -> None:
    with refused(OptionError, "'abacus'", "choose from auto, tensorrt, onnxruntime, eager"):
        runtime.load(golden_bundle, "abacus")


def test_there_but_not_built(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the same as a back end that is not installed."""
    bundle = export.build(tiny_checkpoint, tmp_path / "b", backends=[])
    without(monkeypatch, "torch")
    with refused(BundleError, "no engines for onnxruntime", "python -m export build --backend onnxruntime"):
        runtime.load(bundle)


# Threads


@pytest.mark.parametrize("threads", [0, -1, 10**6])
def test_threads_out_of_range(golden_bundle: Path, threads: int) -> None:
    for name in ON_CPU:
        with refused(OptionError, "threads must lie in 1 …", "cores", str(threads)):
            runtime.load(golden_bundle, name, threads=threads)


def test_load(golden_bundle: Path) -> None:
    """An opened bundle becomes the model of the named back end."""
    model = backends.load(Bundle.open(golden_bundle), "onnxruntime")
    assert isinstance(model, OnnxRuntimeModel) and model.capacity.window == 32
    model.close()
