"""Finding and loading back ends: what is missing is named, and an option that is not taken is refused."""

import importlib
import importlib.util
import inspect
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import export
import runtime
from engines import registry as backends
from engines.bundle import Bundle
from engines.errors import BackendError, BundleError, OptionError
from engines.ort.model import OnnxRuntimeModel
from engines.registry import BACKENDS, accepted, available
from tests.support.cases import edit_manifest, refused

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
    with refused(
        BundleError, "no engines for onnxruntime", "`python -m export build --checkpoint", "--backend onnxruntime"
    ):
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


# Options


@pytest.mark.parametrize("name", BACKENDS)
def test_options_are_those_of_the_opener(name: str) -> None:
    """The dataclass of a back end has the names and defaults of the function that it is passed to."""
    back_end = BACKENDS[name]
    opener = getattr(importlib.import_module(back_end.module), back_end.opener)
    _, *parameters = inspect.signature(opener).parameters.values()
    assert {p.name: p.default for p in parameters} == {f.name: f.default for f in fields(back_end.options)}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [("eager", {"provider": "cpu"}, ("takes no option provider", "threads, device")),
     ("onnxruntime", {"device": 0, "colour": 1}, ("no option colour, device", "threads, provider")),
     ("tensorrt", {"threads": 1}, ("takes no option threads", "flavour, device")),
     ("auto", {"colour": 1}, ("eager takes no option colour",))],
)  # fmt: skip
def test_options_that_are_not_taken(
    golden_bundle: Path, name: str, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    with refused(OptionError, *words, "leave it out, or choose another back end"):
        runtime.load(golden_bundle, name, **options)


def test_none_is_not_given(golden_bundle: Path) -> None:
    with runtime.load(golden_bundle, "eager", threads=None, provider=None, device="cpu") as model:
        assert model.backend == "eager"


def test_auto_passes_over_what_does_not_take_an_option(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A preferred back end that is ready is named in a warning; one that is not built is not."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: real("json") if name in TENSORRT else real(name, *a)
    )
    with runtime.load(bundle_copy, threads=1) as model:
        assert model.backend == "onnxruntime" and not caplog.text
    edit_manifest(bundle_copy, lambda m: m["engines"].update(tensorrt={}))
    with runtime.load(bundle_copy, threads=1) as model:
        assert model.backend == "onnxruntime" and "not using tensorrt: it takes no option threads" in caplog.text
    with runtime.load(bundle_copy, provider="cpu") as model:
        assert model.backend == "onnxruntime"
    with runtime.load(bundle_copy, device="cpu") as model:
        assert model.backend == "eager" and "not using onnxruntime: it takes no option device" in caplog.text


def test_options_that_are_taken() -> None:
    given = {"threads": 2, "device": 0}
    assert accepted("tensorrt", given) == {"device": 0} and accepted("eager", given) == given
    assert accepted("abacus", given) == given, "`load` refuses the name"


def test_a_load_is_logged(golden_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "engines"), runtime.load(golden_bundle, "onnxruntime"):
        (line,) = [record.getMessage() for record in caplog.records if record.name == "engines.registry"]
    assert line.startswith("onnxruntime on CPU, 1 threads") and "loaded in" in line
