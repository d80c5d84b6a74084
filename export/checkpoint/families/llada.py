"""The family LLaDA, in the format of GSAI-ML/LLaDA-8B-Instruct (arXiv 2502.09992).

LLaDA-8B-Base, LLaDA-8B-Instruct and LLaDA-1.5 belong to it. An absent key counts
as null, and null has the meaning of the published config class; a key whose null
has no implemented meaning is required. The same models are also published with
the keys and tensor names of Llama's classes, as LLaDA-V takes them.
"""

import json
from typing import Any

from engines.config import ModelConfig
from export.checkpoint import Family, Weight, llama
from export.checkpoint.config_keys import Keys, expect

# Keys that are read; those of the first group have no default.
REQUIRED = (
    "d_model", "n_heads", "n_layers", "vocab_size", "max_sequence_length", "rope_theta", "rms_norm_eps",
    "weight_tying", "mask_token_id", "eos_token_id", "block_type", "activation_type", "layer_norm_type", "rope",
)  # fmt: skip
OPTIONAL = (
    "n_kv_heads", "multi_query_attention", "mlp_hidden_size", "mlp_ratio", "embedding_size",
    "include_bias", "include_qkv_bias", "bias_for_layer_norm", "tie_word_embeddings",
)  # fmt: skip

# Switches with one implemented value.
FIXED: dict[str, Any] = {
    "block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms", "rope": True,
    "rope_full_precision": True, "alibi": False, "attention_layer_norm": False, "input_emb_norm": False,
    "scale_logits": False, "layer_norm_with_affine": True, "block_group_size": 1, "rope_scaling": None,
}  # fmt: skip

LLAMA_FIXED: dict[str, Any] = {"hidden_act": "silu", "rope_scaling": None, "attention_bias": False, "mlp_bias": False}

HARMLESS = frozenset((  # training, and details of switches that are off
    "precision", "flash_attention", "alibi_bias_max", "attention_layer_norm_with_affine",
))  # fmt: skip


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """The `ModelConfig` of a LLaDA config.json; raises CheckpointError naming the key that is wrong."""
    if raw.get("d_model") is None and raw.get("hidden_size") is not None:
        keys = Keys("llada", raw, llama.REQUIRED, llama.OPTIONAL, LLAMA_FIXED, ())
        return ModelConfig(family="llada", **llama.numbers(keys), qkv_bias=False, bias=False)
    keys = Keys("llada", raw, REQUIRED, OPTIONAL, FIXED, HARMLESS)
    d_model, heads = keys.count("d_model"), keys.count("n_heads")
    vocab = keys.count("vocab_size")
    columns = keys.count("embedding_size", vocab)
    head_size = d_model // heads
    expect(d_model % heads == 0, "d_model", d_model, f"a multiple of n_heads ({heads})")
    expect(head_size % 2 == 0, "d_model", d_model, f"an even number per head ({heads} heads), for the rotary")
    kv_heads = _kv_heads(keys, heads)
    expect(columns >= vocab, "embedding_size", columns, f"at least vocab_size ({vocab})")
    bias, tied = keys.flag("include_bias", False), keys.flag("weight_tying")
    norm_bias = keys.flag("bias_for_layer_norm", bias)
    expect(not norm_bias, "bias_for_layer_norm", norm_bias, "false (null means the value of include_bias)")
    expect(keys.flag("tie_word_embeddings", tied) == tied, "tie_word_embeddings", not tied, "equal to weight_tying")
    exact = "mlp_hidden_size" in keys.values
    mlp_size = keys.count("mlp_hidden_size") if exact else keys.count("mlp_ratio", 4) * d_model
    mask_id, (eos_id, *more_ends) = keys.token("mask_token_id", vocab), keys.tokens("eos_token_id", vocab)
    expect(mask_id not in (eos_id, *more_ends), "mask_token_id", mask_id, "another id than eos_token_id")
    return ModelConfig(
        family="llada",
        layers=keys.count("n_layers"),
        d_model=d_model,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        mlp_size=mlp_size,
        vocab=columns,
        max_length=keys.count("max_sequence_length"),
        rope_theta=keys.number("rope_theta"),
        norm_eps=keys.number("rms_norm_eps"),
        qkv_bias=bias or keys.flag("include_qkv_bias", False),
        bias=bias,
        tied=tied,
        mask_id=mask_id,
        eos_id=eos_id,
        more_ends=tuple(more_ends),
    )


def weights(config: ModelConfig, part: str) -> dict[str, Weight]:
    """Local name -> tensor, for the part `part` of `config.parts`."""
    d, size = config.d_model, config.head_size
    if part == "embed":
        return {"wte.weight": Weight("model.transformer.wte.weight", (config.vocab, d), False)}
    if part == "head":
        matrix = "wte" if config.tied else "ff_out"
        found = {
            "ln_f.weight": Weight("model.transformer.ln_f.weight", (d,), False),
            "ff_out.weight": Weight(f"model.transformer.{matrix}.weight", (config.vocab, d), True),
        }
        if config.bias and not config.tied:
            found["ff_out.bias"] = Weight("model.transformer.ff_out.bias", (config.vocab,), False)
        return found
    prefix = f"model.transformer.blocks.{config.parts.index(part) - 1}"
    found = {f"{norm}.weight": Weight(f"{prefix}.{norm}.weight", (d,), False) for norm in ("attn_norm", "ff_norm")}
    matrices = (  # name, out, in, bias
        ("q_proj", config.heads * size, d, config.qkv_bias),
        ("k_proj", config.kv_heads * size, d, config.qkv_bias),
        ("v_proj", config.kv_heads * size, d, config.qkv_bias),
        ("attn_out", d, config.heads * size, config.bias),
        ("ff_proj", config.mlp_size, d, config.bias),  # the gate
        ("up_proj", config.mlp_size, d, config.bias),
        ("ff_out", d, config.mlp_size, config.bias),
    )
    for name, rows, columns, biased in matrices:
        found[f"{name}.weight"] = Weight(f"{prefix}.{name}.weight", (rows, columns), True)
        if biased:
            found[f"{name}.bias"] = Weight(f"{prefix}.{name}.bias", (rows,), False)
    return found


def _kv_heads(keys: Keys, heads: int) -> int:
    """Key/value heads: n_kv_heads or, if that is absent, what multi_query_attention implies; both must agree."""
    if "multi_query_attention" not in keys.values:
        kv_heads = keys.count("n_kv_heads", heads)
    else:
        multi_query = keys.flag("multi_query_attention")
        implied = 1 if multi_query else heads
        kv_heads = keys.count("n_kv_heads", implied)
        wanted = f"{implied}, as multi_query_attention is {json.dumps(multi_query)}"
        expect(kv_heads == implied, "n_kv_heads", kv_heads, wanted)
    expect(heads % kv_heads == 0, "n_kv_heads", kv_heads, f"a divisor of n_heads ({heads})")
    return kv_heads


FAMILY = Family(
    name="llada",
    model_type="llada",
    architectures=("LLaDAModelLM",),
    read_config=read_config,
    weights=weights,
    namings=(llama.weights,),
    published=("GSAI-ML/LLaDA-8B-Base", "GSAI-ML/LLaDA-8B-Instruct", "GSAI-ML/LLaDA-1.5"),
    ignorable=("*.rotary_emb.inv_freq",),
    decoding={"window": 16},  # arXiv 2510.14973
    end_of_turn="<|eot_id|>",
    mask="<|mdm_mask|>",
)
