"""The family iLLaDA, in the published layout of its Hugging Face class.

Llama's keys and tensor names with grouped key/value heads and a head that is tied
to the embedding; attention is bidirectional, and a row predicts its own position.
Neither config.json nor the tokenizer's configuration names the mask.
"""

from typing import Any

from engines.config import ModelConfig
from export.checkpoint import Family, llama
from export.checkpoint.config_keys import Keys

FIXED: dict[str, Any] = {
    "hidden_act": "silu", "rope_scaling": None, "attention_bias": False, "mlp_bias": False, "layer_norm_eps": None,
}  # fmt: skip


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """The `ModelConfig` of an iLLaDA config.json; raises CheckpointError naming the key that is wrong."""
    keys = Keys("illada", raw, llama.REQUIRED, llama.OPTIONAL, FIXED, ("resid_pdrop",))
    return ModelConfig(family="illada", **llama.numbers(keys), qkv_bias=False, bias=False)


FAMILY = Family(
    name="illada",
    model_type="illada",
    architectures=("ILLaDAForCausalLM",),
    read_config=read_config,
    weights=llama.weights,
    published=("GSAI-ML/iLLaDA-8B-Base", "GSAI-ML/iLLaDA-8B-Instruct"),
    ignorable=("*.rotary_emb.inv_freq",),
    decoding={"window": 16},
    mask="<[MASK]>",
    ids={"mask_token_id": 5, "eos_token_id": 2},
)
