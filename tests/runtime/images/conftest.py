"""Stored tensors of the published vision tower."""

from typing import Any

import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.support.vision import GOLDEN


@pytest.fixture(scope="module")
def stored() -> dict[str, NDArray[Any]]:
    return dict(load_file(GOLDEN / "vision.safetensors"))
