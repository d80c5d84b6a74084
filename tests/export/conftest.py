"""What the tests of builds share."""

from pathlib import Path

import numpy as np
import pytest

import export
from tests.support.builds import logits


@pytest.fixture(scope="session")
def undisturbed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Logits [2, 40, V] of the tiny checkpoint, from a build that nothing interrupted."""
    return logits(export.build(tiny_checkpoint, tmp_path_factory.mktemp("undisturbed") / "bundle"))
