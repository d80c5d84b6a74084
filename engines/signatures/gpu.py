"""Signatures of the parts for GPUs: attention is one masked operator, and rows lie by slot.

The active rows occupy the first slots, so a layer writes its keys and values in one contiguous piece and its
caches are aliased: the same memory is input and output. Axis letters: see `engines.signatures`.
"""

from engines.config import ModelConfig, layer_name
from engines.signatures import GraphSignature, TensorSpec

DRIFTS = ("row", "head")  # kinds of drift test, defined in `engines.eager.layers.drift`


def embed_signature(config: ModelConfig, dtype: str) -> GraphSignature:
    """Token ids to hidden states."""
    return GraphSignature(
        "embed", (TensorSpec("ids", "int64", ("B", "A")),), (TensorSpec("hidden", dtype, ("B", "A", config.d_model)),)
    )


def layer_signature(config: ModelConfig, dtype: str, index: int) -> GraphSignature:
    """One layer on A rows; their keys and values are written to the caches from slot `write_index` on.

    `positions` feed the rotary embedding only. `key_bias` is 0 for keys that count and minus infinity for others:
    of a boolean mask a compiler makes seven kernels that look for rows without keys. Where attention is block-causal,
    keys count whose `key_positions` are before the `block_ends` of a row.
    """
    blocks = (TensorSpec("key_positions", "int64", ("B", "S")), TensorSpec("block_ends", "int64", ("B", "A")))
    cache = ("B", config.kv_heads, "S", config.head_size)
    return GraphSignature(
        layer_name(index),
        (
            TensorSpec("hidden", dtype, ("B", "A", config.d_model)),
            TensorSpec("positions", "int64", ("B", "A")),
            TensorSpec("key_bias", dtype, ("B", "S")),
            TensorSpec("write_index", "int64", ("B",)),
            TensorSpec("k_cache", dtype, cache),
            TensorSpec("v_cache", dtype, cache),
            *(blocks if config.block_length else ()),
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
    """Final norm and logits of the chosen `rows`; the most probable token, [MASK] excluded, and its probability."""
    return GraphSignature(
        "head",
        (TensorSpec("hidden", dtype, ("B", "A", config.d_model)), TensorSpec("rows", "int64", ("B", "W"))),
        (
            TensorSpec("token", "int64", ("B", "W")),
            TensorSpec("confidence", "fp32", ("B", "W")),
            TensorSpec("logits", "fp32", ("B", "W", config.vocab)),
        ),
    )


def tests_signature(config: ModelConfig, dtype: str, kind: str, track_num: int) -> GraphSignature:
    """The tests of one layer after a reuse pass: `sigma` of the drift test `kind`, and the layer's `probe`.

    `sigma` is the similarity of the tracked rows' attention before and after the pass, `probe` the slots of the keys
    that receive most of the window's attention, in descending order. Tracked rows and window are among the first T
    slots, where `tracked_rows` and `window_rows` are true. `q_prev` and `k_prev` hold the queries and keys of the
    first slots before the pass; all other keys are unchanged in `k_cache`. Only keys whose `probe_keys` is true count
    for the probe.
    """
    rows = ("B", "T", config.heads, config.head_size)
    keys = ("B", config.kv_heads, "S", config.head_size)
    return GraphSignature(
        f"tests_{kind}",
        (
            TensorSpec("q_prev", dtype, rows),
            TensorSpec("q_now", dtype, rows),
            TensorSpec("tracked_rows", "bool", ("B", "T")),
            TensorSpec("window_rows", "bool", ("B", "T")),
            TensorSpec("k_prev", dtype, ("B", config.kv_heads, "A", config.head_size)),
            TensorSpec("k_cache", dtype, keys),
            TensorSpec("key_bias", dtype, ("B", "S")),
            TensorSpec("probe_keys", "bool", ("B", "S")),
        ),
        (TensorSpec("sigma", "fp32", ("B",)), TensorSpec("probe", "int64", ("B", track_num))),
    )


def probe_signature(config: ModelConfig, dtype: str, track_num: int) -> GraphSignature:
    """The slots of one layer's keys that receive most of the window's attention, in descending order.

    The window lies among the first W slots, where `window_rows` is true; only keys whose `probe_keys` is true count.
    """
    return GraphSignature(
        "probe",
        (
            TensorSpec("q_window", dtype, ("B", "W", config.heads, config.head_size)),
            TensorSpec("window_rows", "bool", ("B", "W")),
            TensorSpec("k_cache", dtype, ("B", config.kv_heads, "S", config.head_size)),
            TensorSpec("key_bias", dtype, ("B", "S")),
            TensorSpec("probe_keys", "bool", ("B", "S")),
        ),
        (TensorSpec("probe", "int64", ("B", track_num)),),
    )


def gpu_signatures(config: ModelConfig, dtype: str, track_num: int) -> tuple[GraphSignature, ...]:
    """All graphs of a language model in the GPU dialect: embed, layers, head, then the tests and the probe alone.

    `dtype` is the bundle's precision, `track_num` the number of keys K that the probe returns.
    """
    layers = (layer_signature(config, dtype, i) for i in range(config.layers))
    tests = (tests_signature(config, dtype, kind, track_num) for kind in DRIFTS)
    return (
        embed_signature(config, dtype),
        *layers,
        head_signature(config, dtype),
        *tests,
        probe_signature(config, dtype, track_num),
    )
