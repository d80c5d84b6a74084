"""The demo bundle, built once for the tests of the bench."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import export
import runtime


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.build("demo", tmp_path_factory.mktemp("demo") / "bundle", max_length=640)


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[runtime.Runtime]:
    with runtime.load(bundle, "onnxruntime", threads=1) as loaded:
        yield loaded
