"""Names of tensors as Llama's published classes have them, which several families took over.

Nothing here knows a family, or where a checkpoint lies.
"""

from engines.models import Weight
from engines.spec import ModelConfig


def weights(config: ModelConfig, part: str) -> dict[str, Weight]:
    """Local name -> tensor, for the part `part` of `config.parts`."""
    d, size = config.d_model, config.head_size
    table = "model.embed_tokens.weight"
    if part == "embed":
        return {"wte.weight": Weight(table, (config.vocab, d), False)}
    if part == "head":
        return {
            "ln_f.weight": Weight("model.norm.weight", (d,), False),
            "ff_out.weight": Weight(table if config.tied else "lm_head.weight", (config.vocab, d), True),
        }
    prefix = f"model.layers.{config.parts.index(part) - 1}"
    found = {
        "attn_norm.weight": Weight(f"{prefix}.input_layernorm.weight", (d,), False),
        "ff_norm.weight": Weight(f"{prefix}.post_attention_layernorm.weight", (d,), False),
        "attn_out.weight": Weight(f"{prefix}.self_attn.o_proj.weight", (d, config.heads * size), True),
        "ff_proj.weight": Weight(f"{prefix}.mlp.gate_proj.weight", (config.mlp_size, d), True),
        "up_proj.weight": Weight(f"{prefix}.mlp.up_proj.weight", (config.mlp_size, d), True),
        "ff_out.weight": Weight(f"{prefix}.mlp.down_proj.weight", (d, config.mlp_size), True),
    }
    for name, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads)):
        found[f"{name}_proj.weight"] = Weight(f"{prefix}.self_attn.{name}_proj.weight", (heads * size, d), True)
        if config.qkv_bias:
            found[f"{name}_proj.bias"] = Weight(f"{prefix}.self_attn.{name}_proj.bias", (heads * size,), False)
    return found
