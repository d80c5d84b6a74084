"""The family LLaDA, in the format of GSAI-ML/LLaDA-8B-Instruct (arXiv 2502.09992).

Every key of config.json is implemented, harmless, or refused by name. An absent
key counts as null, and null means what it means to the published config class;
a key whose null has no implemented meaning is required. Nothing here knows where
a checkpoint lies, how tensors are stored, or how a layer computes.
"""

import json
import sys
from typing import Any

from engines.errors import CheckpointError
from engines.models import Family, Weight
from engines.spec import ModelConfig

# Keys that are read; the first group is never guessed.
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

# What does not change a forward pass: origin, initialisation, training, and details of switches that are off.
HARMLESS = frozenset((
    "model_type", "architectures", "auto_map", "_name_or_path", "transformers_version", "torch_dtype", "dtype",
    "use_cache", "precision", "flash_attention", "init_device", "init_fn", "init_std", "init_cutoff_factor",
    "attention_dropout", "residual_dropout", "embedding_dropout", "alibi_bias_max",
    "attention_layer_norm_with_affine", "bos_token_id", "pad_token_id",
))  # fmt: skip


def read_config(raw: dict[str, Any]) -> ModelConfig:
    """The numbers of a LLaDA config.json; raises CheckpointError naming the key that is wrong."""
    keys = _Keys(raw)
    d_model, heads = keys.count("d_model"), keys.count("n_heads")
    vocab = keys.count("vocab_size")
    columns = keys.count("embedding_size", vocab)
    head_size = d_model // heads
    _expect(d_model % heads == 0, "d_model", d_model, f"a multiple of n_heads ({heads})")
    _expect(head_size % 2 == 0, "d_model", d_model, f"an even number per head ({heads} heads), for the rotary")
    kv_heads = _kv_heads(keys, heads)
    _expect(columns >= vocab, "embedding_size", columns, f"at least vocab_size ({vocab})")
    bias, tied = keys.flag("include_bias", False), keys.flag("weight_tying")
    norm_bias = keys.flag("bias_for_layer_norm", bias)
    _expect(not norm_bias, "bias_for_layer_norm", norm_bias, "false (null means the value of include_bias)")
    _expect(keys.flag("tie_word_embeddings", tied) == tied, "tie_word_embeddings", not tied, "equal to weight_tying")
    exact = "mlp_hidden_size" in keys.given
    mlp_size = keys.count("mlp_hidden_size") if exact else keys.count("mlp_ratio", 4) * d_model
    mask_id, eos_id = keys.token("mask_token_id", vocab), keys.token("eos_token_id", vocab)
    _expect(mask_id != eos_id, "mask_token_id", mask_id, "another id than eos_token_id")
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


def _expect(holds: bool, key: str, value: Any, wanted: str) -> None:
    """Raise CheckpointError unless `holds`: `key` has `value` where `wanted` is needed."""
    if not holds:
        raise CheckpointError(
            f"config.json: {key} is {json.dumps(value)}, expected {wanted}; "
            "correct it, or use a checkpoint this family implements"
        )


class _Keys:
    """The keys of a config that are given, checked by name; null counts as absent."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.given = {key: value for key, value in raw.items() if value is not None}
        unknown = sorted(set(self.given) - HARMLESS - FIXED.keys() - {*REQUIRED, *OPTIONAL})
        missing = [key for key in REQUIRED if key not in self.given]
        if unknown:
            listed = ", ".join(f"{key} = {json.dumps(self.given[key])}" for key in unknown)
            raise CheckpointError(
                f"config.json: the family llada does not know {listed}; "
                "remove the key if it does not change the model's numbers"
            )
        if missing:
            raise CheckpointError(
                f"config.json: {', '.join(missing)} missing or null; take them from the model's published config"
            )
        for key, value in FIXED.items():
            came = self.given.get(key, value)
            _expect(type(came) is type(value) and came == value, key, came, json.dumps(value))

    def count(self, key: str, default: int | None = None) -> int:
        value: Any = self.given.get(key, default)
        _expect(type(value) is int and value > 0, key, value, "a positive integer")
        return int(value)

    def token(self, key: str, vocab: int) -> int:
        value = self.given[key]
        _expect(type(value) is int and 0 <= value < vocab, key, value, f"an id below vocab_size ({vocab})")
        return int(value)

    def number(self, key: str) -> float:
        value = self.given[key]
        positive = type(value) in (int, float) and 0 < value <= sys.float_info.max
        _expect(positive, key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self.given.get(key, default)
        _expect(type(value) is bool, key, value, "true or false")
        return bool(value)


def _kv_heads(keys: _Keys, heads: int) -> int:
    """Key/value heads: n_kv_heads, which multi_query_attention stands for if absent and must agree with if given."""
    if "multi_query_attention" not in keys.given:
        kv_heads = keys.count("n_kv_heads", heads)
    else:
        multi_query = keys.flag("multi_query_attention")
        implied = 1 if multi_query else heads
        kv_heads = keys.count("n_kv_heads", implied)
        wanted = f"{implied}, as multi_query_attention is {json.dumps(multi_query)}"
        _expect(kv_heads == implied, "n_kv_heads", kv_heads, wanted)
    _expect(heads % kv_heads == 0, "n_kv_heads", kv_heads, f"a divisor of n_heads ({heads})")
    return kv_heads


LLADA = Family(
    name="llada",
    model_type="llada",
    architectures=("LLaDAModelLM",),
    read_config=read_config,
    weights=weights,
    ignorable=("*.rotary_emb.inv_freq",),
)
