"""The golden checkpoint on TensorRT, with the fake GPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import runtime
from tests.support.fake_gpu import fake_gpu
from tests.support.gpu_models import build_golden


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint in fp32, compiled by the fake. Read only."""
    return build_golden(tmp_path_factory.mktemp("tensorrt") / "bundle")


@pytest.fixture(scope="session")
def model(bundle: Path) -> Iterator[runtime.Runtime]:
    with fake_gpu():
        loaded = runtime.load(bundle, "tensorrt")
    with loaded:
        yield loaded


@pytest.fixture(scope="session")
def reference(bundle: Path) -> Iterator[runtime.Runtime]:
    with runtime.load(bundle, "onnxruntime", threads=1) as loaded:
        yield loaded
