"""The family LLaDA: published configs and directories, and every key of config.json."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import export
import runtime
from engines.errors import CheckpointError
from export.checkpoint.families.llada import FIXED, HARMLESS, OPTIONAL, REQUIRED, read_config
from export.checkpoint.registry import find_family
from scripts.experiments.make_random_checkpoint import COMMON, SHAPES, make_checkpoint
from tests.support.cases import write_tokenizer

PUBLISHED_LLADA = {  # GSAI-ML/LLaDA-8B-Instruct; LLaDA-8B-Base and LLaDA-1.5 have the same numbers
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM",
                 "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"},
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 4096,
    "embedding_dropout": 0.0, "embedding_size": 126464, "eos_token_id": 126081, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta",
    "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "mask_token_id": 126336, "max_sequence_length": 4096, "mlp_hidden_size": 12288,
    "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None, "n_heads": 32, "n_kv_heads": 32,
    "n_layers": 32, "pad_token_id": 126081, "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05,
    "rope": True, "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False,
    "transformers_version": "4.46.3", "use_cache": False, "vocab_size": 126464, "weight_tying": False,
}  # fmt: skip


TINY: dict[str, Any] = {**COMMON, **SHAPES["tiny"]}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def test_a_published_llada_config() -> None:
    """Every key is known; later versions of the library that saved it add their own."""
    for extra in ({}, {"bos_token_id": 126080, "dtype": "bfloat16", "transformers_version": "4.57.6"}):
        config = find_family(PUBLISHED_LLADA | extra).read_config(PUBLISHED_LLADA | extra)
        assert (config.layers, config.d_model, config.heads, config.kv_heads) == (32, 4096, 32, 32)
        assert (config.mask_id, config.eos_id, config.vocab, config.max_length) == (126336, 126081, 126464, 4096)
        assert (config.mlp_size, config.shift, config.qk_norm, config.tied) == (12288, 0, False, False)


@pytest.mark.slow
def test_a_directory_as_published(tmp_path: Path) -> None:
    """All keys of the config, shards and index, tokenizer, template and generation defaults: built and asked."""
    small = {"d_model": 64, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "mlp_hidden_size": 96, "rope_theta": 5e5}
    numbers = {"vocab_size": 280, "embedding_size": 280, "mask_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
    folder = make_checkpoint(tmp_path / "checkpoint", PUBLISHED_LLADA | small | numbers, "bf16", shard_bytes=1)
    assert json.loads((folder / "config.json").read_text())["precision"] == "amp_bf16"
    write_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {"261": {"content": "<|eot_id|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    defaults = {"_from_model_config": True, "bos_token_id": 126080, "eos_token_id": 257}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    bundle = export.build(folder, tmp_path / "bundle", precision="fp16")
    with runtime.load(bundle, "onnxruntime", threads=1) as loaded:
        assert loaded.bundle.config.eot_id == 261 and loaded.bundle.manifest.defaults["window"] == 16
        said = loaded.generate("Hi", gen_length=16, confidence_eos_eot_inf=True)
        assert said.steps and 256 not in said.sequence[-16:]


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
        ("eos_token_id", 64), ("eos_token_id", [1, 64]), ("eos_token_id", []), ("eos_token_id", [1, 63]),
        ("rope_theta", 0), ("rope_theta", float("nan")),
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


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted({*REQUIRED, *OPTIONAL, *FIXED, *HARMLESS})), json_values, max_size=3))
def test_any_config_is_read_or_refused(keys: dict[str, Any]) -> None:
    try:
        config = find_family(TINY | keys).read_config(TINY | keys)
    except CheckpointError:
        return
    assert config.d_model == config.heads * config.head_size and config.heads % config.kv_heads == 0
