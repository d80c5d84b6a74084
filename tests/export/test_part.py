"""Parts on disk: every tensor read once, cast and hashed on the way to all files that hold it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import export
import export.checkpoint
from engines.bundle import MANIFEST, Bundle
from engines.errors import CheckpointError
from engines.weights import NAMES, locate
from export.checkpoint.reader import open_checkpoint
from export.part import sources_digest
from scripts.experiments.make_random_checkpoint import SHAPES, make_checkpoint
from tests.support.builds import logits
from tests.support.cases import refused


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision(tiny_checkpoint: Path, tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    """The graphs hold rounded weights; those for the CPU the same numbers in fp32, and the embedding as it is."""
    bundle = Bundle.open(export.build(tiny_checkpoint, tmp_path / "b", precision=precision))
    stored = open_checkpoint(tiny_checkpoint)
    for part in bundle.config.parts:
        for name, tensor in load_file(bundle.weights(part)).items():
            assert torch.equal(tensor, stored.part(part)[name].to(dtype).contiguous()), (part, name)
        built = bundle.file(bundle.engines("onnxruntime")["parts"][part]["weights"])
        for name, tensor in load_file(built).items():
            assert torch.equal(tensor.float(), stored.part(part)[name].to(dtype).float().contiguous()), (part, name)
        assert {e.dtype for e in locate(built).values()} == {precision if part == "embed" else "fp32"}
    assert bundle.manifest.precision == precision
    assert logits(bundle.root).shape == (2, 40, 64)


def test_fp16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", SHAPES["tiny"])
    from safetensors.torch import save_file

    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model.transformer.blocks.1.q_proj.weight"][0, 0] = 1e6
    save_file(tensors, shard)
    with refused(CheckpointError, "layer_01", "q_proj.weight", "fp16", "--bf16"):
        export.build(folder, tmp_path / "b", precision="fp16")
    assert not (tmp_path / "b" / MANIFEST).exists()
    assert logits(export.build(folder, tmp_path / "b", precision="bf16")).shape == (2, 40, 64)


def test_no_stamp_outlives_the_names_of_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(str(export.checkpoint.__file__)).parent
    shutil.copytree(folder, tmp_path / "models")
    before = sources_digest.__wrapped__()
    monkeypatch.setattr(export.checkpoint, "__file__", str(tmp_path / "models/__init__.py"))
    assert sources_digest.__wrapped__() == before
    family = tmp_path / "models/families/llada.py"
    family.write_text(family.read_text().replace("ff_proj", "up_proj"))
    assert sources_digest.__wrapped__() != before


def test_codes_of_weights() -> None:
    assert sorted(NAMES) == ["BF16", "F16", "F32"]
