"""Keys of config.json that every saver writes in its way, and those that change nothing."""

from typing import Any

import pytest

from engines.errors import CheckpointError
from export.checkpoint.families.dream import FAMILY as DREAM
from export.checkpoint.families.llada import FAMILY as LLADA
from scripts.experiments.make_random_checkpoint import COMMON, SHAPES
from tests.support.cases import refused

TINY: dict[str, Any] = {**COMMON, **SHAPES["tiny"]}
TINY_DREAM: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 256, "max_position_embeddings": 512, "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6, "mask_token_id": 252, "eos_token_id": 240, "hidden_act": "silu",
}  # fmt: skip
FAMILIES = [(LLADA, TINY), (DREAM, TINY_DREAM)]
DEFAULT = {"rope_type": "default"}


@pytest.mark.parametrize(("family", "raw"), FAMILIES)
@pytest.mark.parametrize(
    ("theta", "keys", "wanted"),
    [
        (1000000, {}, 1e6),
        (None, {"rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}}, 2e4),
        (None, {"rope_parameters": {"rope_theta": 20000}}, 2e4),
        (10000.0, {"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}}, 1e4),
        (500000.0, {"rope_parameters": DEFAULT}, 5e5),
        (500000.0, {"rope_scaling": DEFAULT}, 5e5),
        (500000.0, {"rope_scaling": {"type": "default", "rope_type": "default", "factor": None}}, 5e5),
        (500000.0, {"rope_scaling": None}, 5e5),
        (None, {"rope_parameters": {"rope_theta": 3e4, "rope_type": "default", "partial_rotary_factor": 1.0}}, 3e4),
        (None, {"rope_parameters": {"rope_theta": 3e4} | DEFAULT, "rope_scaling": {"rope_theta": 3e4} | DEFAULT}, 3e4),
    ],
)
def test_a_plain_rotary(family: Any, raw: dict[str, Any], theta: Any, keys: dict[str, Any], wanted: float) -> None:
    assert family.read_config(raw | {"rope_theta": theta} | keys).rope_theta == wanted


@pytest.mark.parametrize(("family", "raw"), FAMILIES)
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ("rope_scaling", "linear")),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, ("rope_scaling", "dynamic")),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0}}, ("rope_parameters", "llama3")),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, ("rope_parameters", "yarn")),
        ({"rope_parameters": {"rope_theta": 2e4} | DEFAULT}, ("rope_theta of rope_parameters is 20000.0", "10000.0")),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ("partial_rotary_factor",)),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ("rope_parameters", "full_attention")),
        ({"rope_parameters": 3}, ("rope_parameters = 3",)),
        ({"rope_theta": None, "rope_parameters": DEFAULT}, ("rope_theta", "missing")),
        ({"rope_theta": "10000.0"}, ("rope_theta", "a positive number")),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": "1e4"}}, ("rope_theta", "a positive number")),
    ],
)
def test_other_rotaries_are_refused(
    family: Any, raw: dict[str, Any], keys: dict[str, Any], words: tuple[str, ...]
) -> None:
    with refused(CheckpointError, "config.json", *words):
        family.read_config(raw | {"rope_theta": 1e4} | keys)


@pytest.mark.parametrize(("family", "raw"), FAMILIES)
@pytest.mark.parametrize(
    "keys",
    [
        {"dtype": "bfloat16", "torch_dtype": "bfloat16", "transformers_version": "5.24.0", "use_cache": False},
        {"_attn_implementation_autoset": True, "_name_or_path": "x", "_commit_hash": "0", "_of_tomorrow": {"a": 1}},
        {"attn_implementation": "sdpa", "experts_implementation": "eager"},
        {"unsloth_version": "2026.1", "unsloth_fixed": True, "peft_version": "0.18", "transformers_weights": "x"},
        {"layer_types": ["full_attention", "full_attention"]},
        {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": "regression", "prefix": ""},
        {"return_dict": True, "output_hidden_states": False, "output_attentions": False, "torchscript": False},
        {"is_decoder": False, "is_encoder_decoder": False, "add_cross_attention": False, "pruned_heads": {}},
        {"chunk_size_feed_forward": 0, "tie_encoder_decoder": False, "tf_legacy_loss": False, "is_causal": False},
        {"bos_token_id": 1, "sep_token_id": 2, "decoder_start_token_id": 3, "pad_token_id": 4},
        {"do_sample": False, "temperature": 1.0, "top_k": 50, "num_beams": 1, "repetition_penalty": 1.0},
        {"no_repeat_ngram_size": 0, "forced_bos_token_id": 3, "suppress_tokens": [3], "max_length": 20},
        {"hidden_dropout": 0.1, "attention_dropout": 0.1, "initializer_range": 0.02, "mlp_bias": False},
    ],
)
def test_keys_of_newer_and_older_savers(family: Any, raw: dict[str, Any], keys: dict[str, Any]) -> None:
    assert family.read_config(raw | keys) == family.read_config(raw)


@pytest.mark.parametrize(("family", "raw"), FAMILIES)
@pytest.mark.parametrize(
    ("key", "value"),
    [("colour", 1), ("sliding_windows", 128), ("num_experts", 8), ("is_decoder", True), ("mlp_bias", True),
     ("pruned_heads", {"0": [1]}), ("layer_types", ["sliding_attention"]), ("layer_types", "full_attention"),
     ("use_qk_norm", True), ("a_switch_of_tomorrow", False), ("chunk_size_feed_forward", 4),
     ("quantization_config", {"bits": 4})],
)  # fmt: skip
def test_what_may_change_a_pass_is_refused(family: Any, raw: dict[str, Any], key: str, value: Any) -> None:
    with refused(CheckpointError, "config.json", key):
        family.read_config(raw | {key: value})


def test_the_size_of_a_head() -> None:
    assert DREAM.read_config(TINY_DREAM | {"head_dim": 16}).head_size == 16
    with refused(CheckpointError, "head_dim is 32", "hidden_size / num_attention_heads (16)"):
        DREAM.read_config(TINY_DREAM | {"head_dim": 32})


@pytest.mark.slow
def test_every_key_of_the_class_of_all_configs() -> None:
    """Those of the installed version of transformers, with the values that it gives them."""
    transformers = pytest.importorskip("transformers", reason="transformers, whose keys are compared, is not installed")
    for family, raw in FAMILIES:
        added = transformers.PretrainedConfig().to_dict()
        written = {key: value for key, value in added.items() if key not in raw}
        assert len(written) > 10 and family.read_config(raw | written) == family.read_config(raw)
