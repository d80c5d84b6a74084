"""fp16 that overflows is seen when a part is built, and again by `verify --half`."""

from pathlib import Path
from typing import Any

import pytest
import torch

import export
import export.cli
from engines.bundle import Bundle
from engines.eager.model import EagerModel
from engines.errors import CheckpointError, OptionError, RangeError
from export.build import DEMO
from export.checkpoint.reader import open_checkpoint
from export.half import LARGEST, HalfPass, probe_ids, verify_half
from scripts.experiments.make_random_checkpoint import SHAPES, make_checkpoint
from tests.support.cases import DATA, GOLDEN, refused, write_tokenizer
from tests.support.checkpoints import as_single, rewrite
from tests.support.commands import Call, failed
from tests.support.vision import CHECKPOINT

WEIGHT = "model.transformer.blocks.{}.{}.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny checkpoint to bend: two layers of width 32, weights in one file."""
    return as_single(make_checkpoint(tmp_path / "checkpoint", SHAPES["tiny"]))


def scale(folder: Path, tensor: str, largest: float = 60_000) -> None:
    """Multiply a tensor so that its largest number is `largest`, by default near the end of fp16's range."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[tensor] = tensors[tensor] * (largest / tensors[tensor].abs().max())

    rewrite(folder, change)


# While it is built


@pytest.mark.parametrize(
    ("tensor", "part"),
    [(WEIGHT.format(0, "ff_out"), "layer_00"), (WEIGHT.format(1, "ff_out"), "layer_01"),
     (WEIGHT.format(1, "attn_out"), "layer_01"), (WEIGHT.format(1, "v_proj"), "layer_01"),
     (WEIGHT.format(0, "up_proj"), "layer_00"), ("model.transformer.ff_out.weight", "head")],
)  # fmt: skip
def test_the_part_that_overflows_is_named(tensor: str, part: str, checkpoint: Path, tmp_path: Path) -> None:
    scale(checkpoint, tensor)
    overflow = f"{part}: activations leave the range of fp16 (±65504)"
    with refused(CheckpointError, overflow, "build in another precision with", "--bf16"):
        export.build(checkpoint, tmp_path / "b", precision="fp16")
    for precision in ("bf16", "fp32"):
        assert export.build(checkpoint, tmp_path / precision, precision=precision).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("folder", [GOLDEN, DATA / "dream-tiny", CHECKPOINT])
def test_healthy_checkpoints_build(folder: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(export.build(folder, tmp_path / "b", precision="fp16", backends=[], max_length=64))
    parts = dict(verify_half(bundle))
    assert list(parts) == [*bundle.config.parts, *bundle.config.vision_parts]
    assert all(0 < largest < 1000 for largest in parts.values())


def test_a_large_number_is_no_overflow(checkpoint: Path, tmp_path: Path) -> None:
    """A layer that puts out tens of thousands passes."""
    table = "model.transformer.wte.weight"
    scale(checkpoint, table, 20_000)
    bundle = Bundle.open(export.build(checkpoint, tmp_path / "b", precision="fp16", backends=[]))
    assert 10_000 < dict(verify_half(bundle))["layer_01"] < LARGEST


# What is run


def test_every_operation_is_rounded() -> None:
    """The same as the eager back end in half precision, bit by bit."""
    source = open_checkpoint(GOLDEN)
    ids = probe_ids(source.config, None)
    forward = HalfPass(source.config, ids)
    for part in source.config.parts[:-1]:
        forward.run(part, source.part(part))
    model: Any = EagerModel.__new__(EagerModel)
    model.config, model.torch_device, model.dtype = source.config, torch.device("cpu"), torch.float16
    model.tables = forward.tables
    model.weights = {
        part: {name: tensor.half() for name, tensor in source.part(part).items()} for part in source.config.parts
    }
    logits = model.forward(torch.tensor([ids]).numpy())
    half = source.part("head")
    assert forward.output.dtype == torch.float16
    assert forward.run("head", half) == pytest.approx(float(abs(logits).max()), rel=1e-3)


def test_the_layout_of_a_matrix_changes_nothing() -> None:
    """A checkpoint gives matrices by columns, a bundle by rows."""
    source = open_checkpoint(GOLDEN)
    found = []
    for layout in (torch.clone, torch.Tensor.contiguous):
        forward = HalfPass(source.config, probe_ids(source.config, None))
        found.append(
            [
                forward.run(part, {name: layout(tensor) for name, tensor in source.part(part).items()})
                for part in source.config.parts
            ]
        )
    assert found[0] == pytest.approx(found[1], rel=1e-2)


def test_the_ids(tmp_path: Path) -> None:
    demo = open_checkpoint(DEMO).config
    ids = probe_ids(demo, (DEMO / "tokenizer.json").read_bytes())
    assert ids[0] == demo.eos_id and ids[-8:] == [demo.mask_id] * 8 and 30 < len(ids) <= demo.max_length
    assert all(0 <= number < demo.vocab for number in ids)
    tiny = open_checkpoint(make_checkpoint(tmp_path / "c", SHAPES["tiny"])).config
    write_tokenizer(tmp_path)  # of another model, with ids beyond this one's vocabulary
    for tokenizer in (None, (tmp_path / "tokenizer.json").read_bytes()):
        assert all(0 <= number < tiny.vocab for number in probe_ids(tiny, tokenizer))
    with refused(CheckpointError, "tokenizer.json is not a tokenizer"):
        probe_ids(tiny, b"version https://git-lfs.github.com/spec/v1\n")


# verify --half


def test_verify_half(call: Call, golden_bundle: Path, tmp_path: Path) -> None:
    bundle = export.build(GOLDEN, tmp_path / "b", precision="fp16")
    code, printed, err = call(export.cli.main, "verify", bundle, "--half")
    assert (code, err) == (0, "") and "layer_03" in printed and "largest number" in printed and "[ok]" in printed
    failed(call(export.cli.main, "verify", golden_bundle, "--half"), 2, "is in fp32", "fp16")


def test_verify_half_of_a_bundle_that_overflows(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """One that an earlier version has built."""
    scale(checkpoint, WEIGHT.format(1, "ff_out"))
    with monkeypatch.context() as patch:
        patch.setattr(HalfPass, "run", lambda *_: 0.0)
        bundle = export.build(checkpoint, tmp_path / "b", precision="fp16")
    seen = []
    with refused(RangeError, "layer_01: activations leave", "--bf16 --force --out"):
        for part, _ in verify_half(Bundle.open(bundle)):
            seen.append(part)
    assert seen == ["embed", "layer_00"]

    with pytest.raises(OptionError, match="bf16"):
        next(verify_half(Bundle.open(export.build(checkpoint, tmp_path / "b16", precision="bf16"))))
