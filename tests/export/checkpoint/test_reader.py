"""Reading checkpoints: what the golden one holds, what is read when, and what is refused with which words."""

import json
import pickle
import re
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engines.errors import CheckpointError, OptionError
from export.checkpoint.families.llada import FAMILY as LLADA
from export.checkpoint.families.llada import FIXED, HARMLESS, OPTIONAL, REQUIRED, read_config
from export.checkpoint.reader import INDEX, SINGLE, Checkpoint, open_checkpoint
from export.checkpoint.registry import find_family
from scripts.experiments.make_random_checkpoint import COMMON, SHAPES, Normals, make_checkpoint
from tests.support.cases import GOLDEN

TINY: dict[str, Any] = {**COMMON, **SHAPES["tiny"]}
LAYER_1_Q = "model.transformer.blocks.1.q_proj.weight"


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A tiny checkpoint of four shards, one a part."""
    return make_checkpoint(tmp_path / "sharded", SHAPES["tiny"], shard_bytes=1)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A tiny checkpoint of one file, without an index."""
    return as_single(make_checkpoint(tmp_path / "single", SHAPES["tiny"]))


def as_single(directory: Path) -> Path:
    (directory / INDEX).unlink()
    next(directory.glob("*.safetensors")).rename(directory / SINGLE)
    return directory


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a checkpoint of one file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / SINGLE).items()}
    change(tensors)
    save_file(tensors, directory / SINGLE)


def refused(directory: Path, *words: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and "; " in message, "one sentence with a remedy"
    return caught.value


def stored(directory: Path) -> dict[str, torch.Tensor]:
    files = set(json.loads((directory / INDEX).read_text())["weight_map"].values())
    return {name: tensor for file in files for name, tensor in load_file(directory / file).items()}


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
        "tied": False, "mask_id": 255, "eos_id": 250, "eot_id": None, "shift": 0, "qk_norm": False,
        "suppressed": (), "system": None, "vision": None,
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


def test_generation_defaults(sharded: Path) -> None:
    """What the checkpoint says about decoding is read; other defaults in the file are not ours."""
    path = sharded / "generation_config.json"
    assert open_checkpoint(sharded).decoding() == {"window": 16}
    path.write_text('{"eos_token_id": 62, "elastic": {"threshold": 0.7, "window": 4}}')
    assert open_checkpoint(sharded).decoding() == {"threshold": 0.7, "window": 4}
    for content, words in (("[]", "no JSON object"), ("{", "no JSON object"), ('{"elastic": {"colour": 1}}', "colour")):
        path.write_text(content)
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(sharded).decoding()


def test_tokenizer_files(sharded: Path) -> None:
    assert open_checkpoint(sharded).tokenizer_files() == []
    for name in ("generation_config.json", "tokenizer.json", "README.md", "merges.txt"):
        (sharded / name).write_text("{}")
    found = open_checkpoint(sharded).tokenizer_files()
    assert found == [sharded / "tokenizer.json", sharded / "generation_config.json"], "the pair is for want of it"


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


# What config.json may say


@pytest.mark.parametrize(
    ("keys", "field", "value"),
    [
        ({"n_kv_heads": None}, "kv_heads", 4),
        ({"n_kv_heads": None, "multi_query_attention": True}, "kv_heads", 1),
        ({"n_kv_heads": 1, "multi_query_attention": True}, "kv_heads", 1),
        ({"n_kv_heads": None, "multi_query_attention": False}, "kv_heads", 4),
        ({"mlp_hidden_size": None, "mlp_ratio": 3}, "mlp_size", 96),
        ({"mlp_hidden_size": None, "mlp_ratio": None}, "mlp_size", 128),
        ({"embedding_size": None}, "vocab", 64),
        ({"rope_theta": 500000}, "rope_theta", 500000.0),
        ({"include_qkv_bias": None}, "qkv_bias", False),
        ({"include_bias": True}, "qkv_bias", True),
        ({"transformers_version": "4.46.3", "attention_dropout": 0.1, "_name_or_path": "x"}, "layers", 2),
        ({"a_key_of_tomorrow": None}, "layers", 2),
        ({"bias_for_layer_norm": None}, "bias", False),
        ({"tie_word_embeddings": False}, "tied", False),
    ],
)
def test_config_defaults(keys: dict[str, Any], field: str, value: Any) -> None:
    config = read_config(TINY | keys)
    assert getattr(config, field) == value and type(getattr(config, field)) is type(value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alibi", True), ("attention_layer_norm", True), ("block_type", "sequential"), ("layer_norm_type", "default"),
        ("activation_type", "swiglu"), ("input_emb_norm", True), ("scale_logits", True), ("rope", False),
        ("rope_full_precision", False), ("block_group_size", 2), ("block_group_size", True),
        ("bias_for_layer_norm", True), ("layer_norm_with_affine", False), ("tie_word_embeddings", True),
        ("rope_scaling", {"type": "linear", "factor": 2.0}), ("quantization_config", {"bits": 4}),
        ("sliding_window", 128), ("num_experts", 8),
        ("d_model", 30), ("d_model", 4), ("d_model", 0), ("d_model", -32), ("d_model", 32.0), ("d_model", "32"),
        ("d_model", True), ("n_heads", 3), ("n_kv_heads", 3), ("n_kv_heads", 8), ("n_layers", 0),
        ("mlp_hidden_size", 0), ("max_sequence_length", 0), ("embedding_size", 63), ("multi_query_attention", True),
        ("mask_token_id", 64), ("mask_token_id", -1), ("mask_token_id", 62), ("mask_token_id", 1.0),
        ("eos_token_id", 64), ("eos_token_id", [1, 2]), ("rope_theta", 0), ("rope_theta", float("nan")),
        ("rope_theta", 10**400), ("rms_norm_eps", -1e-5), ("rms_norm_eps", "1e-5"), ("include_bias", 1),
        ("weight_tying", "no"),
    ],
)  # fmt: skip
def test_config_refusals_name_the_key(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"^config.json: .*\b{key}\b.*; "):
        read_config(TINY | {key: value})


def test_biases_of_norms_follow_include_bias_when_null() -> None:
    with pytest.raises(CheckpointError, match="bias_for_layer_norm is true, expected false"):
        read_config(TINY | {"include_bias": True, "bias_for_layer_norm": None})


@pytest.mark.parametrize("key", REQUIRED)
def test_required_keys(key: str) -> None:
    for raw in (TINY | {key: None}, {k: v for k, v in TINY.items() if k != key}):
        with pytest.raises(CheckpointError, match=f"config.json: {key} missing or null"):
            read_config(raw)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted({*REQUIRED, *OPTIONAL, *FIXED, *HARMLESS})), json_values, max_size=3))
def test_any_config_is_read_or_refused(keys: dict[str, Any]) -> None:
    try:
        config = find_family(TINY | keys).read_config(TINY | keys)
    except CheckpointError:
        return
    assert config.d_model == config.heads * config.head_size and config.heads % config.kv_heads == 0


@pytest.mark.parametrize(
    "keys",
    [{"model_type": "llama"}, {"model_type": None}, {"model_type": ["llada"]},
     {"architectures": ["LLaDAMoEModelLM"]}, {"architectures": []}, {"architectures": "LLaDAModelLM"}],
)  # fmt: skip
def test_unknown_families_are_told_the_known_ones(keys: dict[str, Any]) -> None:
    with pytest.raises(
        CheckpointError, match=r"use a checkpoint of a known family \(.*llada: 'llada' with LLaDAModelLM"
    ):
        find_family(TINY | keys)


def test_family_without_architectures() -> None:
    assert find_family({"model_type": "llada"}) is LLADA


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
    (single / SINGLE).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
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


def test_superfluous_head_of_a_tied_model(single: Path) -> None:
    edit(single / "config.json", lambda config: config.update(weight_tying=True))
    refused(single, "model.transformer.ff_out.weight")


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
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


# Pickles


class Bomb:
    """Pickled, it writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"])
def test_pickles_are_never_loaded(sharded: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(sharded / "config.json", tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    refused(tmp_path, "pickled weights", "weights_only=True", "save_file", shlex.quote(str(tmp_path)))
    assert not (tmp_path / "exploded").exists()


def test_the_command_against_pickles_works(sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    shutil.copy(sharded / "config.json", folder)
    names = sorted(path.name for path in sharded.glob("*.safetensors"))
    for name in names:
        torch.save(
            load_file(sharded / name), folder / name.replace("model", "pytorch_model").replace("safetensors", "bin")
        )
    message = str(refused(folder))
    command = shlex.split(message[message.index("python -c") :])
    subprocess.run([sys.executable, *command[1:]], check=True, timeout=60)
    wanted, came = open_checkpoint(sharded), open_checkpoint(folder)
    for part in wanted.config.parts:
        assert all(torch.equal(tensor, came.part(part)[local]) for local, tensor in wanted.part(part).items())


# The maker of random checkpoints


def test_random_checkpoints_are_seeded(tmp_path: Path) -> None:
    def identity(name: str, seed: int) -> str:
        return open_checkpoint(make_checkpoint(tmp_path / name, SHAPES["tiny"], seed=seed)).identity

    assert identity("a", 1) == identity("b", 1) != identity("c", 2)


def test_random_checkpoints_do_not_overwrite(sharded: Path) -> None:
    with pytest.raises(OptionError, match="is not empty"):
        make_checkpoint(sharded, SHAPES["tiny"])


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
