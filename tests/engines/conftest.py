"""The golden bundle on each back end of the CPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import runtime


@pytest.fixture(scope="module", params=["onnxruntime", "eager"])
def model(request: pytest.FixtureRequest, golden_bundle: Path) -> Iterator[runtime.Runtime]:
    with runtime.load(golden_bundle, request.param, threads=1) as loaded:
        yield loaded
