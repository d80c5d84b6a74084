"""The family Dream, in the format of Dream-org/Dream-v0-Instruct-7B (arXiv 2508.15487).

A Qwen2 transformer whose attention is not causal, with biases on Q, K and V and
grouped key/value heads. It was adapted from a left-to-right model, so the row of
a position predicts the next position. Dream-Coder-7B and DiffuCoder-7B (arXiv
2506.20639) are Dreams with other ids and tokenizers.
"""

from typing import Any

from engines.config import ModelConfig
from export.checkpoint import Family, llama
from export.checkpoint.config_keys import Keys

FIXED: dict[str, Any] = {"hidden_act": "silu", "rope_scaling": None, "use_sliding_window": False, "use_mrope": False}
HARMLESS = frozenset(("sliding_window", "max_window_layers"))  # of a switch that is off


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
    published=(
        "Dream-org/Dream-v0-Base-7B",
        "Dream-org/Dream-v0-Instruct-7B",
        "Dream-org/Dream-Coder-v0-Base-7B",
        "Dream-org/Dream-Coder-v0-Instruct-7B",
        "apple/DiffuCoder-7B-Base",
        "apple/DiffuCoder-7B-Instruct",
        "apple/DiffuCoder-7B-cpGRPO",
    ),
    ignorable=("*.rotary_emb.inv_freq",),
    decoding={"window": 32},  # arXiv 2510.14973
    length=2048,  # positions in training; the config has 131072
    end_of_turn="<|im_end|>",
    ends=("<|dlm_pad|>",),  # DiffuCoder-7B-Instruct fills the rest of an answer with it
    mask="<|mask|>",
    tokenizer="Qwen2Tokenizer",
)
