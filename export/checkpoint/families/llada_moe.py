"""The family LLaDA-MoE, in the published layout of LLaDA-MoE-7B-A1B.

Llama's keys and tensor names, with a mixture of experts in place of the
feed-forward network and norms of Q and K before the rotary embedding. Its
model_type is that of LLaDA, so the architecture tells the two apart. No file of
the published directory names the mask.
"""

from typing import Any

from engines.config import ExpertsConfig, ModelConfig
from export.checkpoint import Family, llama
from export.checkpoint.config_keys import Keys, expect

REQUIRED = (
    *(key for key in llama.REQUIRED if key != "intermediate_size"),
    "num_experts", "num_experts_per_tok", "expert_intermediate_size", "moe_layer_freq",
)  # fmt: skip
OPTIONAL = (*llama.OPTIONAL, "dense_intermediate_size", "qk_layernorm")
FIXED: dict[str, Any] = {
    "hidden_act": "silu", "rope_scaling": None, "attention_bias": False, "clip_qkv": None,
    "shared_expert_intermediate_size": None, "moe_router_enable_expert_bias": False,
}  # fmt: skip
HARMLESS = frozenset((  # keys that the published class does not use
    "moe_router_score_function", "norm_topk_prob", "routed_scaling_factor", "router_num_group", "router_topk_group",
    "router_aux_loss_coef", "output_router_logits",
))  # fmt: skip


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a LLaDA-MoE config.json; raises CheckpointError naming the key that is wrong."""
    keys = Keys("llada-moe", raw, REQUIRED, OPTIONAL, FIXED | {"partial_rotary_factor": 1}, HARMLESS)
    count, per_row = keys.count("num_experts"), keys.count("num_experts_per_tok")
    expect(per_row <= count, "num_experts_per_tok", per_row, f"at most num_experts ({count})")
    layers, mixed = keys.count("num_hidden_layers"), keys.values["moe_layer_freq"]
    fine = isinstance(mixed, list) and len(mixed) == layers and set(mixed) <= {0, 1}
    expect(fine, "moe_layer_freq", mixed, f"a 0 or a 1 for each of the {layers} layers")
    dense = tuple(index for index, has in enumerate(mixed) if not has)
    size = keys.count("expert_intermediate_size")
    return ModelConfig(
        family="llada-moe",
        **llama.numbers(keys, "dense_intermediate_size" if dense else "expert_intermediate_size"),
        qkv_bias=False,
        bias=False,
        qk_norm=keys.flag("qk_layernorm", False),
        experts=ExpertsConfig(count=count, size=size, per_row=per_row, dense=dense),
    )


FAMILY = Family(
    name="llada-moe",
    model_type="llada",
    architectures=("LLaDAMoEModelLM",),
    read_config=read_config,
    weights=llama.weights,
    published=("inclusionAI/LLaDA-MoE-7B-A1B-Base", "inclusionAI/LLaDA-MoE-7B-A1B-Instruct"),
    ignorable=("*.rotary_emb.inv_freq",),
    decoding={"window": 16},
    mask="<|mask|>",
    ids={"mask_token_id": 156895, "eos_token_id": 156892},
)
