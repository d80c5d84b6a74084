"""The family Dream, in the format of Dream-org/Dream-v0-Instruct-7B (arXiv 2508.15487).

A Qwen2 transformer whose attention is not causal: biases on Q, K and V, grouped
key/value heads. It was adapted from a left-to-right model, so the row of a
position predicts the one after it. Nothing here knows where a checkpoint lies or
how a layer computes.
"""

from typing import Any

from engines.models import Family, llama
from engines.models.keys import Keys, expect
from engines.spec import ModelConfig

REQUIRED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "rope_theta", "rms_norm_eps", "mask_token_id", "eos_token_id", "hidden_act",
)  # fmt: skip
OPTIONAL = ("num_key_value_heads", "tie_word_embeddings")
FIXED: dict[str, Any] = {"hidden_act": "silu", "rope_scaling": None, "use_sliding_window": False, "use_mrope": False}
HARMLESS = frozenset((
    "model_type", "architectures", "auto_map", "_name_or_path", "transformers_version", "torch_dtype", "dtype",
    "use_cache", "initializer_range", "attention_dropout", "sliding_window", "max_window_layers",
    "bos_token_id", "pad_token_id",
))  # fmt: skip


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """The numbers of a Dream config.json; raises CheckpointError naming the key that is wrong."""
    keys = Keys("dream", raw, REQUIRED, OPTIONAL, FIXED, HARMLESS)
    d_model, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    expect(d_model % (2 * heads) == 0, "hidden_size", d_model, f"an even number per head ({heads} heads)")
    kv_heads = keys.count("num_key_value_heads", heads)
    expect(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
    vocab = keys.count("vocab_size")
    mask_id, eos_id = keys.token("mask_token_id", vocab), keys.token("eos_token_id", vocab)
    expect(mask_id != eos_id, "mask_token_id", mask_id, "another id than eos_token_id")
    return ModelConfig(
        family="dream",
        layers=keys.count("num_hidden_layers"),
        d_model=d_model,
        heads=heads,
        kv_heads=kv_heads,
        head_size=d_model // heads,
        mlp_size=keys.count("intermediate_size"),
        vocab=vocab,
        max_length=keys.count("max_position_embeddings"),
        rope_theta=keys.number("rope_theta"),
        norm_eps=keys.number("rms_norm_eps"),
        qkv_bias=True,
        bias=False,
        tied=keys.flag("tie_word_embeddings", False),
        mask_id=mask_id,
        eos_id=eos_id,
        shift=1,
    )


FAMILY = Family(
    name="dream",
    model_type="Dream",
    architectures=("DreamModel",),
    read_config=read_config,
    weights=llama.weights,
    ignorable=("*.rotary_emb.inv_freq",),
    decoding={"window": 32},  # arXiv 2510.14973
    length=2048,  # what it was trained on; the config says 131072
    end_of_turn="<|im_end|>",
    # As Qwen2 splits text: contractions, words, single digits, punctuation, line ends, blanks.
    split=(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
)
