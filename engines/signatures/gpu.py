"""What the parts of a model and their ports are: plain data shared by all rooms.

Axes carry the same letters everywhere: B batch, A active rows, S slots,
H heads, G key/value heads, D head size, d width, V columns of the logits,
T tracked rows, W window rows, K tracked keys per layer; of images: N tiles,
P patches of a tile, Dv the vision tower's width. Nothing here knows a file
format, a tensor library or a back end.
"""

from engines.config import ModelConfig, layer_name
from engines.signatures import GraphSignature, TensorSpec

DRIFTS = ("row", "head")  # variants of the drift test, defined in `engines.eager.layers.drift`


def embed_signature(config: ModelConfig, dtype: str) -> GraphSignature:
    return GraphSignature(
        "embed", (TensorSpec("ids", "int64", ("B", "A")),), (TensorSpec("hidden", dtype, ("B", "A", config.d_model)),)
    )


def layer_signature(config: ModelConfig, dtype: str, index: int) -> GraphSignature:
    """A transformer block on the first A slots: caches are written in place from `write_index`."""
    cache = ("B", config.kv_heads, "S", config.head_size)
    return GraphSignature(
        layer_name(index),
        (
            TensorSpec("hidden", dtype, ("B", "A", config.d_model)),
            TensorSpec("positions", "int64", ("B", "A")),
            TensorSpec("key_mask", "bool", ("B", "S")),
            TensorSpec("write_index", "int64", ("B",)),
            TensorSpec("k_cache", dtype, cache),
            TensorSpec("v_cache", dtype, cache),
        ),
        (
            TensorSpec("hidden_out", dtype, ("B", "A", config.d_model)),
            TensorSpec("q", dtype, ("B", "A", config.heads, config.head_size)),
            TensorSpec("k_cache_out", dtype, cache),
            TensorSpec("v_cache_out", dtype, cache),
        ),
        (("k_cache_out", "k_cache"), ("v_cache_out", "v_cache")),
    )


def head_signature(config: ModelConfig, dtype: str) -> GraphSignature:
    """Final norm and logits of the chosen `rows`; arg-max without [MASK], its softmax probability."""
    return GraphSignature(
        "head",
        (TensorSpec("hidden", dtype, ("B", "A", config.d_model)), TensorSpec("rows", "int64", ("B", "W"))),
        (
            TensorSpec("token", "int64", ("B", "W")),
            TensorSpec("confidence", "fp32", ("B", "W")),
            TensorSpec("logits", "fp32", ("B", "W", config.vocab)),
        ),
    )


def drift_signature(config: ModelConfig, dtype: str, kind: str) -> GraphSignature:
    """The drift test of one layer: `k_prev` holds the first A slots' keys before the pass."""
    rows = ("B", "T", config.heads, config.head_size)
    return GraphSignature(
        f"drift_{kind}",
        (
            TensorSpec("q_prev", dtype, rows),
            TensorSpec("q_now", dtype, rows),
            TensorSpec("tracked_rows", "bool", ("B", "T")),
            TensorSpec("k_prev", dtype, ("B", config.kv_heads, "A", config.head_size)),
            TensorSpec("k_cache", dtype, ("B", config.kv_heads, "S", config.head_size)),
            TensorSpec("key_mask", "bool", ("B", "S")),
        ),
        (TensorSpec("sigma", "fp32", ("B",)),),
    )


def probe_signature(config: ModelConfig, dtype: str, track_num: int) -> GraphSignature:
    """The most-attended keys of one layer, as slots, most attended first."""
    return GraphSignature(
        "probe",
        (
            TensorSpec("q_window", dtype, ("B", "W", config.heads, config.head_size)),
            TensorSpec("window_rows", "bool", ("B", "W")),
            TensorSpec("k_cache", dtype, ("B", config.kv_heads, "S", config.head_size)),
            TensorSpec("key_mask", "bool", ("B", "S")),
            TensorSpec("probe_keys", "bool", ("B", "S")),
        ),
        (TensorSpec("probe", "int64", ("B", track_num)),),
    )


def gpu_signatures(config: ModelConfig, dtype: str, track_num: int) -> tuple[GraphSignature, ...]:
    """All parts of a bundle's language model as exported: the ones with weights, then the drift tests and the probe."""
    layers = (layer_signature(config, dtype, i) for i in range(config.layers))
    drifts = (drift_signature(config, dtype, kind) for kind in DRIFTS)
    return (
        embed_signature(config, dtype),
        *layers,
        head_signature(config, dtype),
        *drifts,
        probe_signature(config, dtype, track_num),
    )
