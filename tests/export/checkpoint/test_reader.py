"""Reading checkpoints: what the golden one holds, what is read when, and what is refused with which words."""

import json
import re
import shutil
import struct
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.errors import CheckpointError
from export.checkpoint.families.llada import FAMILY as LLADA
from export.checkpoint.families.llada import read_config
from export.checkpoint.reader import INDEX, SINGLE, Checkpoint, open_checkpoint
from scripts.experiments.make_random_checkpoint import COMMON, SHAPES, make_checkpoint
from tests.support.cases import GOLDEN
from tests.support.checkpoints import as_single, edit, rewrite, stored

TINY: dict[str, Any] = {**COMMON, **SHAPES["tiny"]}
LAYER_1_Q = "model.transformer.blocks.1.q_proj.weight"


def refused(directory: Path, *words: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and "; " in message, "one sentence with a remedy"
    return caught.value


def assert_reads_everything(checkpoint: Checkpoint) -> None:
    """Every part has the shapes its numbers imply, and its matrices are the stored ones, transposed."""
    raw, config = stored(checkpoint.directory), checkpoint.config
    seen = set()
    for part in config.parts:
        tensors = checkpoint.part(part)
        for local, weight in LLADA.weights(config, part).items():
            wanted = raw[weight.tensor].t() if weight.transposed else raw[weight.tensor]
            assert tensors[local].dtype == wanted.dtype and torch.equal(tensors[local], wanted)
            seen.add(weight.tensor)
        assert list(tensors) == list(LLADA.weights(config, part))
    assert seen == set(raw)


# What is read


def test_golden() -> None:
    checkpoint = open_checkpoint(str(GOLDEN))
    assert asdict(checkpoint.config) == {
        "family": "llada", "layers": 4, "d_model": 64, "heads": 4, "kv_heads": 4, "head_size": 16, "mlp_size": 160,
        "vocab": 256, "max_length": 512, "rope_theta": 500000.0, "norm_eps": 1e-5, "qkv_bias": False, "bias": False,
        "tied": False, "mask_id": 255, "eos_id": 250, "eot_id": None, "more_ends": (), "pad_id": 250, "shift": 0,
        "qk_norm": False, "suppressed": (), "system": None, "experts": None, "vision": None,
        "block_length": None, "rotary_size": None,
    }  # fmt: skip
    assert checkpoint.config.parts == ("embed", "layer_00", "layer_01", "layer_02", "layer_03", "head")
    assert {local: tuple(tensor.shape) for local, tensor in checkpoint.part("layer_02").items()} == {
        "attn_norm.weight": (64,), "ff_norm.weight": (64,), "q_proj.weight": (64, 64), "k_proj.weight": (64, 64),
        "v_proj.weight": (64, 64), "attn_out.weight": (64, 64), "ff_proj.weight": (64, 160),
        "up_proj.weight": (64, 160), "ff_out.weight": (160, 64),
    }  # fmt: skip
    raw = stored(GOLDEN)
    assert torch.equal(checkpoint.part("embed")["wte.weight"], raw["model.transformer.wte.weight"])
    assert torch.equal(checkpoint.part("head")["ff_out.weight"], raw["model.transformer.ff_out.weight"].t())
    gate = checkpoint.part("layer_03")["ff_proj.weight"]
    assert torch.equal(gate, raw["model.transformer.blocks.3.ff_proj.weight"].t())
    assert_reads_everything(checkpoint)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_types_stay_as_stored(tmp_path: Path, dtype: str) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", SHAPES["tiny"], dtype))
    wanted = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert {tensor.dtype for part in checkpoint.config.parts for tensor in checkpoint.part(part).values()} == {wanted}
    assert_reads_everything(checkpoint)


def test_grouped_heads(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    layer = checkpoint.part("layer_01")
    assert (checkpoint.config.heads, checkpoint.config.kv_heads, checkpoint.config.head_size) == (4, 2, 8)
    assert layer["q_proj.weight"].shape == (32, 32)
    assert layer["k_proj.weight"].shape == layer["v_proj.weight"].shape == (32, 16)
    assert_reads_everything(checkpoint)


def test_tied_head_is_the_embedding_transposed(tmp_path: Path) -> None:
    shape = SHAPES["tiny"] | {"weight_tying": True, "include_bias": True}
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", shape))
    head = checkpoint.part("head")
    assert checkpoint.config.tied and list(head) == ["ln_f.weight", "ff_out.weight"], "a tied head has no bias"
    assert torch.equal(head["ff_out.weight"], checkpoint.part("embed")["wte.weight"].t())
    assert_reads_everything(checkpoint)


@pytest.mark.parametrize(
    ("keys", "layer", "head"),
    [
        ({"include_qkv_bias": True}, {"q_proj.bias", "k_proj.bias", "v_proj.bias"}, set()),
        (
            {"include_bias": True},
            {f"{n}.bias" for n in ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")},
            {"ff_out.bias"},
        ),
    ],
)
def test_biases(tmp_path: Path, keys: dict[str, Any], layer: set[str], head: set[str]) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", SHAPES["tiny"] | keys))
    biases = {part: {n for n in checkpoint.part(part) if n.endswith(".bias")} for part in checkpoint.config.parts}
    assert biases == {"embed": set(), "layer_00": layer, "layer_01": layer, "head": head}
    assert checkpoint.part("layer_00")["k_proj.bias"].shape == (16,)
    assert_reads_everything(checkpoint)


def test_padded_embedding(tmp_path: Path) -> None:
    shape = SHAPES["tiny"] | {"embedding_size": 96}
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", shape))
    assert checkpoint.config.vocab == 96
    assert checkpoint.part("head")["ff_out.weight"].shape == (32, 96)
    assert_reads_everything(checkpoint)


# What is read when


def test_a_damaged_number_is_found_when_its_part_is_read(single: Path) -> None:
    for number in (float("nan"), float("inf"), -float("inf")):
        rewrite(single, lambda tensors: tensors.update({LAYER_1_Q: torch.full((32, 32), number)}))  # noqa: B023
        checkpoint = open_checkpoint(single)
        assert len(checkpoint.part("layer_00")) == 9
        with pytest.raises(CheckpointError, match=f"{re.escape(LAYER_1_Q)} of part layer_01 holds NaN or Inf"):
            checkpoint.part("layer_01")


def test_opening_parses_headers_only(tmp_path: Path) -> None:
    """A file of LLaDA-8B's 16 GB, all of it a hole: reading it would take longer than the suite."""
    raw = {**COMMON, **SHAPES["llada-8b"]}
    config = read_config(raw)
    header, end = {}, 0
    for part in config.parts:
        for weight in LLADA.weights(config, part).values():
            start, end = end, end + 2 * prod(weight.shape)
            header[weight.tensor] = {"dtype": "BF16", "shape": weight.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (tmp_path / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert end > 16e9
    assert open_checkpoint(tmp_path).config.parts[-2:] == ("layer_31", "head")


def test_a_shard_lost_after_opening(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    lost = checkpoint.shards[LAYER_1_Q]
    lost.unlink()
    assert len(checkpoint.part("layer_00")) == 9
    with pytest.raises(CheckpointError, match=re.escape(lost.name)):
        checkpoint.part("layer_01")


def test_unknown_part(sharded: Path) -> None:
    with pytest.raises(CheckpointError, match="no part 'layer_02'; its parts are embed, layer_00 … head"):
        open_checkpoint(sharded).part("layer_02")


def test_identity(sharded: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert re.fullmatch("[0-9a-f]{64}", checkpoint.identity)
    copy = Path(shutil.copytree(sharded, tmp_path / "copy"))
    (copy / "tokenizer.json").write_text("{}")
    assert open_checkpoint(copy).identity == checkpoint.identity
    shard = copy / checkpoint.shards[LAYER_1_Q].name
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    changed = open_checkpoint(copy).identity
    edit(copy / "config.json", lambda config: config.update(rope_theta=20000.0))
    again = open_checkpoint(copy).identity
    shard.rename(copy / "renamed.safetensors")
    edit(copy / INDEX, lambda index: index["weight_map"].update(
        {t: "renamed.safetensors" for t, file in index["weight_map"].items() if file == shard.name}
    ))  # fmt: skip
    assert len({checkpoint.identity, changed, again}) == 3
    assert open_checkpoint(copy).identity == again, "which file holds a tensor does not change the model"


def test_identity_says_which_tensor_is_which(single: Path) -> None:
    """Two tensors of one shape that are exchanged make another model of the same bytes."""
    before, other = open_checkpoint(single).identity, LAYER_1_Q.replace("q_proj", "attn_out")
    rewrite(single, lambda tensors: tensors.update({LAYER_1_Q: tensors[other], other: tensors[LAYER_1_Q]}))
    assert open_checkpoint(single).identity != before


def test_identity_costs_nothing_after_the_parts(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, checkpoint = open_checkpoint(sharded).identity, open_checkpoint(sharded)
    for part in checkpoint.config.parts:
        checkpoint.part(part)
    monkeypatch.setattr(Checkpoint, "part", lambda *_: pytest.fail("read again"))
    assert checkpoint.identity == wanted


def test_a_tensor_that_changes_during_a_build(single: Path) -> None:
    checkpoint = open_checkpoint(single)
    assert checkpoint.identity
    rewrite(single, lambda tensors: tensors[LAYER_1_Q].add_(1))
    with pytest.raises(
        CheckpointError, match=f"{SINGLE} changed while it was read .{re.escape(LAYER_1_Q)}.; run the build again"
    ):
        checkpoint.part("layer_01")


# What the folder may hold


def test_missing_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere is not a directory")


def test_config_file(sharded: Path) -> None:
    (sharded / "config.json").write_text("{'d_model': 32}")
    assert isinstance(refused(sharded, "config.json cannot be read as JSON").__cause__, ValueError)
    (sharded / "config.json").write_bytes(b"\xff\xfe")
    refused(sharded, "config.json cannot be read as JSON")
    (sharded / "config.json").write_text("[1]")
    refused(sharded, "config.json holds a JSON list, expected an object")
    (sharded / "config.json").unlink()
    refused(sharded, "config.json is missing")


def test_no_weights(sharded: Path, tmp_path: Path) -> None:
    shutil.copy(sharded / "config.json", tmp_path)
    refused(tmp_path, f"holds neither {SINGLE} nor {INDEX}")


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00004.safetensors").unlink()
    error = refused(sharded, "model-00002-of-00004.safetensors is missing")
    assert isinstance(error.__cause__, FileNotFoundError)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_file(single: Path, length: int) -> None:
    content = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(content[:length])
    error = refused(single, f"{SINGLE} is truncated or not a safetensors file")
    assert error.__cause__ is not None and str(error.__cause__) in str(error)


def test_other_file_under_the_name(single: Path) -> None:
    (single / SINGLE).write_bytes(b"Entry not found, and nothing else\n")
    refused(single, f"{SINGLE} is truncated or not a safetensors file")


def test_any_damaged_header_is_refused_or_harmless(tmp_path: Path) -> None:
    directory = as_single(make_checkpoint(tmp_path / "c", SHAPES["tiny"]))
    content = (directory / SINGLE).read_bytes()
    (header,) = struct.unpack("<Q", content[:8])

    @settings(max_examples=100, deadline=None)
    @given(st.integers(0, 7 + header), st.integers(1, 255))
    def check(position: int, flips: int) -> None:
        damaged = bytearray(content)
        damaged[position] ^= flips
        (directory / SINGLE).write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(directory)
            assert all(checkpoint.part(part) for part in checkpoint.config.parts)
        except CheckpointError:
            pass

    check()


def test_missing_weight(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.pop(LAYER_1_Q))
    refused(single, f"lacks {LAYER_1_Q} [32, 32] of part layer_01")


def test_superfluous_weight(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.update({"model.transformer.blocks.0.q_norm.weight": torch.ones(32)}))
    refused(single, "holds 1 tensors that the model", "model.transformer.blocks.0.q_norm.weight")


def test_a_missing_head(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.pop("model.transformer.ff_out.weight"))
    refused(single, "lacks model.transformer.ff_out.weight", "config.json does not tie it to the embedding")


def test_a_tied_head_that_was_saved_as_well(single: Path) -> None:
    """It must be the embedding, number by number; the model is that without it."""
    edit(single / "config.json", lambda config: config.update(weight_tying=True))
    head, table = "model.transformer.ff_out.weight", "model.transformer.wte.weight"
    refused(single, "1 tensors", head)
    rewrite(single, lambda tensors: tensors.update({head: tensors[table].clone()}))
    twice = open_checkpoint(single)
    assert torch.equal(twice.part("head")["ff_out.weight"], twice.part("embed")["wte.weight"].t())
    rewrite(single, lambda tensors: tensors[head][5].add_(1e-3))
    refused(single, "1 tensors", head)
    rewrite(single, lambda tensors: tensors.update({head: tensors[table].half()}))
    refused(single, "1 tensors", head)
    rewrite(single, lambda tensors: tensors.pop(head))
    assert open_checkpoint(single).identity == twice.identity


def test_a_copy_of_the_head_under_another_name(single: Path) -> None:
    rewrite(single, lambda tensors: tensors.update({"lm_head.weight": tensors["model.transformer.ff_out.weight"] * 1}))
    assert len(open_checkpoint(single).part("head")) == 2
    rewrite(single, lambda tensors: tensors["lm_head.weight"].mul_(2))
    refused(single, "lm_head.weight", "save the model without them")


def test_rotary_buffers_are_ignored(single: Path) -> None:
    buffer = {"model.transformer.blocks.0.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64)}
    rewrite(single, lambda tensors: tensors.update(buffer))
    assert len(open_checkpoint(single).part("layer_00")) == 9


def test_wrong_shape(single: Path) -> None:
    edit(single / "config.json", lambda config: config.update(n_kv_heads=4))
    refused(single, "blocks.0.k_proj.weight of part layer_00 has shape [16, 32], expected [32, 32]")


def test_too_many_layers(single: Path) -> None:
    edit(single / "config.json", lambda config: config.update(n_layers=3))
    refused(single, "lacks model.transformer.blocks.2.attn_norm.weight [32] of part layer_02")
    edit(single / "config.json", lambda config: config.update(n_layers=10**12))
    refused(single, "holds 21 tensors, too few for the 1000000000000 layers")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_other_types(single: Path, dtype: torch.dtype) -> None:
    rewrite(single, lambda tensors: tensors.update({LAYER_1_Q: tensors[LAYER_1_Q].to(dtype)}))
    refused(single, f"{LAYER_1_Q} of part layer_01 is stored as", "expected one of F32, F16, BF16")


def test_index_that_is_wrong(sharded: Path) -> None:
    first, last = "model-00001-of-00004.safetensors", "model-00004-of-00004.safetensors"
    edit(sharded / INDEX, lambda index: index["weight_map"].update({LAYER_1_Q: first}))
    refused(sharded, LAYER_1_Q, f"{INDEX} does not place there")
    edit(sharded / INDEX, lambda index: index["weight_map"].pop(LAYER_1_Q))
    refused(sharded, LAYER_1_Q, f"{INDEX} does not place there")
    edit(sharded / INDEX, lambda index: index.update(weight_map={"model.transformer.ln_g.weight": last}))
    refused(sharded, f"{INDEX} does not place there")
    (sharded / INDEX).write_text("{}")
    refused(sharded, f"{INDEX} has no weight_map")
    (sharded / INDEX).write_text("{")
    refused(sharded, f"{INDEX} cannot be read as JSON")


def test_index_that_places_a_tensor_where_it_is_not(sharded: Path) -> None:
    file = "model-00001-of-00004.safetensors"
    edit(sharded / INDEX, lambda index: index["weight_map"].update({"model.transformer.wpe.weight": file}))
    refused(sharded, f"places model.transformer.wpe.weight in {file}, which does not hold it")


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "pytorch_model.bin", 3, None]
)
def test_shards_stay_in_the_folder(sharded: Path, shard: Any) -> None:
    edit(sharded / INDEX, lambda index: index["weight_map"].update({LAYER_1_Q: shard}))
    refused(sharded, f"places {LAYER_1_Q} in {json.dumps(shard)}, expected a .safetensors file beside it")


def test_linked_shards_are_read(sharded: Path, tmp_path: Path) -> None:
    """A download cache keeps the files elsewhere and fills the folder with links."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in sharded.iterdir():
        (linked / path.name).symlink_to(path)
    assert open_checkpoint(linked).identity == open_checkpoint(sharded).identity


def test_one_file_and_an_index(single: Path) -> None:
    (single / INDEX).write_text("{}")
    refused(single, f"holds both {SINGLE} and {INDEX}")
