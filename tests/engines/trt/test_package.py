"""Finding the installed TensorRT package."""

import pytest

from engines.errors import BackendError, OptionError
from engines.trt.package import find
from tests.support.cases import refused
from tests.support.fake_gpu import VERSION, fake_gpu


def test_an_unknown_package() -> None:
    with refused(OptionError, "unknown TensorRT package 'cuda'", "tensorrt, tensorrt_rtx"):
        find("cuda")


def test_no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.trt.package.importlib.import_module", lambda name: __import__("no_such_" + name))
    with refused(BackendError, "TensorRT is not installed", "pip install 'elastic-diffusion[rtx]'"):
        find()


def test_compute_capabilities() -> None:
    """They are written as in options, and others are refused."""
    with fake_gpu():
        package = find("tensorrt")
    assert (package.name, package.version, package.ahead_of_time) == ("tensorrt", VERSION, True)
    assert package.capabilities() == ["7.5", "8.0", "8.6", "8.9", "12.0"]
    assert package.capability("8.9").name == "SM89" and package.capability("current").name == "CURRENT"
    with refused(OptionError, "no compute capability '9.9'", "7.5, 8.0, 8.6, 8.9, 12.0, current"):
        package.capability("9.9")
