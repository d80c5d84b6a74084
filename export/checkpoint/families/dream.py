"""The family Dream, in the format of Dream-org/Dream-v0-Instruct-7B (arXiv 2508.15487).

A Qwen2 transformer whose attention is not causal, with biases on Q, K and V and
grouped key/value heads. It was adapted from a left-to-right model, so the row of
a position predicts the next position.
"""

from typing import Any

from engines.config import ModelConfig
from export.checkpoint import Family, llama
from export.checkpoint.config_keys import Keys

FIXED: dict[str, Any] = {"hidden_act": "silu", "rope_scaling": None, "use_sliding_window": False, "use_mrope": False}
HARMLESS = frozenset((
    "model_type", "architectures", "auto_map", "_name_or_path", "transformers_version", "torch_dtype", "dtype",
    "use_cache", "initializer_range", "attention_dropout", "sliding_window", "max_window_layers",
    "bos_token_id", "pad_token_id",
))  # fmt: skip


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a Dream config.json; raises CheckpointError naming the key that is wrong."""
    keys = Keys("dream", raw, llama.REQUIRED, llama.OPTIONAL, FIXED, HARMLESS)
    return ModelConfig(family="dream", **llama.numbers(keys), qkv_bias=True, bias=False, shift=1)


FAMILY = Family(
    name="dream",
    model_type="Dream",
    architectures=("DreamModel",),
    read_config=read_config,
    weights=llama.weights,
    ignorable=("*.rotary_emb.inv_freq",),
    decoding={"window": 32},  # arXiv 2510.14973
    length=2048,  # positions in training; the config has 131072
    end_of_turn="<|im_end|>",
    mask="<|mask|>",
    tokenizer="Qwen2Tokenizer",
)
