"""The family LLaDA2.0, in the published layout of LLaDA2.0-mini.

A mixture of experts with a grouped router, a bias where experts are compared, and
a shared expert; Q, K and V are one tensor, the rotary turns a part of each head,
and attention is block-causal. No file of the published directory names the mask,
EOS or the length of a block.
"""

from typing import Any

from engines.config import ExpertsConfig, ModelConfig
from export.checkpoint import Family, Weight, llama
from export.checkpoint.config_keys import Keys, expect

REQUIRED = (
    *llama.REQUIRED, "num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group",
    "routed_scaling_factor", "first_k_dense_replace",
)  # fmt: skip
OPTIONAL = (*llama.OPTIONAL, "partial_rotary_factor", "num_shared_experts")
FIXED: dict[str, Any] = {
    "hidden_act": "silu", "rope_scaling": None, "use_bias": False, "use_qkv_bias": False, "use_rmsnorm": True,
    "use_sliding_window": False, "norm_head": False, "norm_softmax": False,
}  # fmt: skip
HARMLESS = frozenset((  # keys that the published class does not use
    "max_window_layers", "moe_router_enable_expert_bias", "norm_topk_prob", "output_router_logits", "rotary_dim",
    "router_dtype", "score_function", "sliding_window", "using_split_qkv_in_self_attention",
))  # fmt: skip
BLOCK_LENGTH = 32


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a LLaDA2.0 config.json; raises CheckpointError naming the key that is wrong."""
    keys = Keys("llada2-moe", raw, REQUIRED, OPTIONAL, FIXED, HARMLESS)
    found = llama.numbers(keys, own_head_size=True)
    count, per_row = keys.count("num_experts"), keys.count("num_experts_per_tok")
    groups, kept, size = keys.count("n_group"), keys.count("topk_group"), keys.count("moe_intermediate_size")
    dense = keys.count("first_k_dense_replace", 0) if keys.values["first_k_dense_replace"] else 0
    expect(count % groups == 0, "n_group", groups, f"a divisor of num_experts ({count})")
    expect(count // groups > 1, "n_group", groups, f"at most num_experts / 2 ({count // 2})")
    expect(kept <= groups, "topk_group", kept, f"at most n_group ({groups})")
    most = kept * count // groups
    expect(per_row <= most, "num_experts_per_tok", per_row, f"at most the experts of topk_group groups ({most})")
    factor = keys.number("partial_rotary_factor") if "partial_rotary_factor" in keys.values else 1.0
    rotated = int(found["head_size"] * factor)
    expect(0 < rotated <= found["head_size"] and rotated % 2 == 0, "partial_rotary_factor", factor, "an even share")
    shared = size * keys.count("num_shared_experts") if keys.values.get("num_shared_experts") else 0
    return ModelConfig(
        family="llada2-moe",
        **found,
        qkv_bias=False,
        bias=False,
        qk_norm=True,
        block_length=BLOCK_LENGTH,
        rotary_size=rotated,
        experts=ExpertsConfig(
            count=count, size=size, per_row=per_row, dense=tuple(range(min(dense, found["layers"]))), sigmoid=True,
            groups=groups, kept_groups=kept, scale=keys.number("routed_scaling_factor"), shared=shared,
        ),
    )  # fmt: skip


def weights(config: ModelConfig, part: str) -> dict[str, Weight]:
    """Local name -> tensor, for the part `part` of `config.parts`: Llama's names but in the attention."""
    found = {name: _renamed(weight) for name, weight in llama.weights(config, part).items()}
    if not part.startswith("layer"):
        return found
    prefix, experts = f"model.layers.{config.parts.index(part) - 1}", config.experts
    heads = {"q": config.heads, "k": config.kv_heads, "v": config.kv_heads}
    total, start = sum(heads.values()) * config.head_size, 0
    for name, count in heads.items():
        shape = count * config.head_size, config.d_model
        tensor = f"{prefix}.attention.query_key_value.weight"
        found[f"{name}_proj.weight"] = Weight(tensor, shape, True, rows=(start, total))
        start += shape[0]
    if experts is not None and "router.weight" in found:
        found["router.bias"] = Weight(f"{prefix}.mlp.gate.expert_bias", (experts.count,), False)
        if experts.shared:
            shared = llama.network(f"{prefix}.mlp.shared_experts", config.d_model, experts.shared)
            found |= {f"shared.{name}": weight for name, weight in shared.items()}
    return found


def _renamed(weight: Weight) -> Weight:
    name = weight.tensor
    for old, new in (
        ("embed_tokens", "word_embeddings"), ("self_attn.o_proj", "attention.dense"),
        ("self_attn.q_norm", "attention.query_layernorm"), ("self_attn.k_norm", "attention.key_layernorm"),
    ):  # fmt: skip
        name = name.replace(old, new)
    return weight._replace(tensor=name)


FAMILY = Family(
    name="llada2-moe",
    model_type="llada2_moe",
    architectures=("LLaDA2MoeModelLM",),
    read_config=read_config,
    weights=weights,
    published=("inclusionAI/LLaDA2.0-mini",),
    ignorable=("*.rotary_emb.inv_freq",),
    decoding={"policy": "block", "threshold": 0.95},  # as its published function
    length=8192,
    mask="<|mask|>",
    ids={"mask_token_id": 156895, "eos_token_id": 156892},
)
