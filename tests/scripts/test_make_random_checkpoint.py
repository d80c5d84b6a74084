"""Random checkpoints: seeded, in shards of a limited size, never over other files."""

import json
from pathlib import Path

import pytest
import torch

from engines.errors import OptionError
from export.checkpoint.reader import INDEX, open_checkpoint
from scripts.experiments.make_random_checkpoint import SHAPES, Normals, make_checkpoint
from tests.support.checkpoints import stored


def test_random_checkpoints_are_seeded(tmp_path: Path) -> None:
    def identity(name: str, seed: int) -> str:
        return open_checkpoint(make_checkpoint(tmp_path / name, SHAPES["tiny"], seed=seed)).identity

    assert identity("a", 1) == identity("b", 1) != identity("c", 2)


def test_random_checkpoints_do_not_overwrite(tiny_checkpoint: Path) -> None:
    with pytest.raises(OptionError, match="is not empty"):
        make_checkpoint(tiny_checkpoint, SHAPES["tiny"])


def test_shard_size(tmp_path: Path) -> None:
    out = make_checkpoint(tmp_path / "c", SHAPES["tiny"] | {"n_layers": 5}, shard_bytes=80_000)
    sizes = [path.stat().st_size for path in sorted(out.glob("*.safetensors"))]
    assert len(sizes) == 4 and max(sizes) <= 80_000
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored(out).values())


def test_large_tensors_have_distinct_rows() -> None:
    tensor = Normals(0, torch.float16).draw((1200, 1024), 0.5)
    assert len(torch.unique(tensor[:, :8], dim=0)) == 1200
    assert float(tensor.float().std()) == pytest.approx(0.5, rel=0.01)
