"""The family SDAR, in the published layout of JetAstra/SDAR (block diffusion on Qwen3's transformer).

Llama's keys and tensor names with a head size of its own and norms of Q and K
before the rotary embedding. Attention is block-causal.
"""

from typing import Any

from engines.config import ModelConfig
from export.checkpoint import Family, llama
from export.checkpoint.config_keys import Keys

FIXED: dict[str, Any] = {
    "hidden_act": "silu", "rope_scaling": None, "attention_bias": False, "use_sliding_window": False,
}  # fmt: skip
HARMLESS = frozenset((  # of training, and of switches that are off
    "sliding_window", "max_window_layers", "debug", "ep_size", "fuse_cross_entropy", "micro_forward", "skip_checkpoint",
    "use_deepep",
))  # fmt: skip


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a SDAR config.json; raises CheckpointError naming the key that is wrong."""
    keys = Keys("sdar", raw, (*llama.REQUIRED, "block_size"), llama.OPTIONAL, FIXED, HARMLESS)
    return ModelConfig(
        family="sdar", **llama.numbers(keys, own_head_size=True), qkv_bias=False, bias=False, qk_norm=True,
        block_length=keys.count("block_size"),
    )  # fmt: skip


FAMILY = Family(
    name="sdar",
    model_type="sdar",
    architectures=("SDARForCausalLM",),
    read_config=read_config,
    weights=llama.weights,
    published=("JetLM/SDAR-1.7B-Chat", "JetLM/SDAR-4B-Chat", "JetLM/SDAR-8B-Chat"),
    ignorable=("*.rotary_emb.inv_freq",),
    decoding={"policy": "block"},
    length=8192,
    end_of_turn="<|im_end|>",
    mask="<|MASK|>",
    tokenizer="Qwen2Tokenizer",
    ids={"mask_token_id": 151669},
)
