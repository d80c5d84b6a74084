"""Keys of config.json and names of tensors as in Llama's published classes, which several families share."""

from typing import Any

from engines.config import ModelConfig
from export.checkpoint import Weight
from export.checkpoint.config_keys import Keys, expect

REQUIRED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "rope_theta", "rms_norm_eps", "mask_token_id", "eos_token_id", "hidden_act",
)  # fmt: skip
OPTIONAL = ("num_key_value_heads", "tie_word_embeddings", "head_dim")


def numbers(keys: Keys, mlp_size: str = "intermediate_size", own_head_size: bool = False) -> dict[str, Any]:
    """The fields of a `ModelConfig` that these keys determine; the family adds its name, its biases and its own fields.

    `mlp_size` is the key of the feed-forward network's width. With `own_head_size` the
    size of a head need not be hidden_size / num_attention_heads. Raises CheckpointError naming the key that is wrong.
    """
    d_model, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
    if not own_head_size or "head_dim" not in keys.values:
        expect(d_model % (2 * heads) == 0, "hidden_size", d_model, f"an even number per head ({heads} heads)")
    size = keys.count("head_dim", d_model // heads)
    fine, even = own_head_size or size * heads == d_model, size % 2 == 0
    expect(fine, "head_dim", size, f"hidden_size / num_attention_heads ({d_model // heads})")
    expect(even, "head_dim", size, "an even number, for the rotary")
    kv_heads = keys.count("num_key_value_heads", heads)
    expect(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
    vocab = keys.count("vocab_size")
    mask_id, (eos_id, *more_ends) = keys.token("mask_token_id", vocab), keys.tokens("eos_token_id", vocab)
    expect(mask_id not in (eos_id, *more_ends), "mask_token_id", mask_id, "another id than eos_token_id")
    return {
        "layers": keys.count("num_hidden_layers"),
        "d_model": d_model,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_size": size,
        "mlp_size": keys.count(mlp_size),
        "vocab": vocab,
        "max_length": keys.count("max_position_embeddings"),
        "rope_theta": keys.number("rope_theta"),
        "norm_eps": keys.number("rms_norm_eps"),
        "tied": keys.flag("tie_word_embeddings", False),
        "mask_id": mask_id,
        "eos_id": eos_id,
        "more_ends": tuple(more_ends),
    }


def network(prefix: str, width: int, size: int) -> dict[str, Weight]:
    """The matrices of a feed-forward network with `size` inner columns: local name -> tensor."""
    return {
        "ff_proj.weight": Weight(f"{prefix}.gate_proj.weight", (size, width), True),
        "up_proj.weight": Weight(f"{prefix}.up_proj.weight", (size, width), True),
        "ff_out.weight": Weight(f"{prefix}.down_proj.weight", (width, size), True),
    }


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
    }
    if config.experts is None or not config.has_experts(config.parts.index(part) - 1):
        found |= network(f"{prefix}.mlp", d, config.mlp_size)
    else:
        found["router.weight"] = Weight(f"{prefix}.mlp.gate.weight", (config.experts.count, d), True)
        stacked = network(f"{prefix}.mlp.experts.*", d, config.experts.size)
        found |= {f"experts.{name}": w._replace(stacked=config.experts.count) for name, w in stacked.items()}
    if config.qk_norm:
        found |= {f"{n}_norm.weight": Weight(f"{prefix}.self_attn.{n}_norm.weight", (size,), False) for n in "qk"}
    for name, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads)):
        found[f"{name}_proj.weight"] = Weight(f"{prefix}.self_attn.{name}_proj.weight", (heads * size, d), True)
        if config.qkv_bias:
            found[f"{name}_proj.bias"] = Weight(f"{prefix}.self_attn.{name}_proj.bias", (heads * size,), False)
    return found
