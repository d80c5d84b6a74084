"""Checkpoints to change."""

from pathlib import Path

import pytest

from scripts.experiments.make_random_checkpoint import SHAPES, make_checkpoint
from tests.support.checkpoints import as_single


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A tiny checkpoint of four shards, one a part."""
    return make_checkpoint(tmp_path / "sharded", SHAPES["tiny"], shard_bytes=1)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A tiny checkpoint of one file, without an index."""
    return as_single(make_checkpoint(tmp_path / "single", SHAPES["tiny"]))
