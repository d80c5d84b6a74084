"""Parts on disk: every tensor read once, cast and hashed on the way to all files that hold it."""

import io
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import export
import export.checkpoint
from engines.bundle import MANIFEST, Bundle
from engines.errors import CheckpointError
from engines.files import describe, sha256
from engines.locks import LOCK
from engines.weights import NAMES, locate
from export.checkpoint import reader
from export.checkpoint.reader import open_checkpoint
from export.part import sources_digest
from scripts.experiments.make_random_checkpoint import SHAPES, make_checkpoint
from tests.support.builds import content, logits
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


# One read for all files


class Reads:
    """Counts how often each tensor of a checkpoint is read, and refuses any other read of its weight files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count: Counter[str] = Counter()
        real_open: Any = vars(reader)["safe_open"]
        real: Any = io.open
        reads = self

        class Opened:
            def __init__(self, *args: Any, **options: Any) -> None:
                self.file: Any = real_open(*args, **options)

            def __enter__(self) -> "Opened":
                self.file.__enter__()
                return self

            def __exit__(self, *error: Any) -> None:
                self.file.__exit__(*error)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

            def get_tensor(self, name: str) -> Any:
                reads.count[name] += 1
                return self.file.get_tensor(name)

        def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            path = Path(str(file))
            assert path.parent.name != "tiny" or path.suffix != ".safetensors", f"{path} is read as a whole"
            return real(file, mode, *args, **options)

        monkeypatch.setattr(reader, "safe_open", Opened)
        monkeypatch.setattr(io, "open", opened)


@pytest.mark.parametrize("options", [{}, {"precision": "fp16"}, {"precision": "bf16", "weights": "int8"}])
def test_every_tensor_is_read_once(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """By a new build, whatever it writes, and by one that goes on; a bundle that is there is compared first."""
    reads = Reads(monkeypatch)
    names = set(open_checkpoint(tiny_checkpoint).shards)
    bundle = export.build(tiny_checkpoint, tmp_path / "b", **options)
    assert reads.count == dict.fromkeys(names, 1)
    (bundle / MANIFEST).unlink()
    export.build(tiny_checkpoint, bundle, **options)
    assert reads.count == dict.fromkeys(names, 2)
    export.build(tiny_checkpoint, bundle, **options)
    assert reads.count == dict.fromkeys(names, 3), "up to date: compared, and nothing else"
    (bundle / "onnx/embed.onnx").unlink()
    export.build(tiny_checkpoint, bundle, **options)
    assert reads.count == dict.fromkeys(names, 5), "compared, then mended"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_hashes_taken_on_the_way_are_those_of_the_files(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """No file that was written is read again for its hash; two graphs of fp32 that both targets have are compared."""
    hashed: list[str] = []

    def noted(path: Path) -> str:
        hashed.append(path.name)
        return sha256(path)

    with monkeypatch.context() as patch:
        patch.setattr("engines.files.sha256", noted)
        bundle = Bundle.open(export.build(tiny_checkpoint, tmp_path / "b", precision))
    shared = ["embed.onnx", "onnx-embed.onnx.json", "head.onnx", "onnx-head.onnx.json"]
    assert hashed == (shared if precision == "fp32" else [])
    assert {path.relative_to(bundle.root).as_posix() for path in bundle.root.rglob("*") if path.is_file()} == {
        *bundle.manifest.files, MANIFEST, LOCK,
    }  # fmt: skip
    for name, entry in bundle.manifest.files.items():
        assert entry == describe(bundle.root / name), name


def test_chunks_do_not_change_a_byte(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = export.build(tiny_checkpoint, tmp_path / "whole", "fp16")
    monkeypatch.setattr("export.part.CHUNK", 100)
    monkeypatch.setattr("export.checkpoint.reader.CHUNK", 7)
    assert content(export.build(tiny_checkpoint, tmp_path / "chunks", "fp16")) == content(whole)


def test_weights_of_another_checkpoint_are_written_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """In an unfinished build a changed tensor has its part written again, though name, size and time are the same."""
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "c"))
    bundle = export.build(checkpoint, tmp_path / "b")
    (bundle / MANIFEST).unlink()
    before = {path.name: path.stat().st_mtime_ns for path in (bundle / "onnx").iterdir()}
    (shard,) = checkpoint.glob("*.safetensors")
    times = shard.stat()
    tensors = load_file(shard)
    tensors["model.transformer.blocks.1.q_proj.weight"] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert shard.stat().st_size == times.st_size and shard.stat().st_mtime_ns == times.st_mtime_ns
    export.build(checkpoint, bundle)
    after = {path.name: path.stat().st_mtime_ns for path in (bundle / "onnx").iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"layer_01.safetensors"}
    assert content(bundle) == content(export.build(checkpoint, tmp_path / "fresh"))
