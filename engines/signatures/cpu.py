"""Signatures of the parts for the CPU: fp32, one sequence, attention written out, rows by position.

Every slot is a key, so nothing is masked. Caches are aliased and rows are written where their positions lie.
The attention rows of tracked tokens and of the window are outputs: the drift test and the probe read them.
Axis letters: see `engines.signatures`.
"""

from engines.config import ModelConfig, layer_name
from engines.signatures import GraphSignature, TensorSpec
from engines.signatures.gpu import DRIFTS, embed_signature, head_signature

PROBE_INPUTS = TensorSpec("probe_keys", "bool", ("S",)), TensorSpec("track_num", "int64", (1,))


def cpu_layer_signature(config: ModelConfig, index: int) -> GraphSignature:
    """One layer on A rows at `positions`.

    `indices` [1, H, A, 3] are the cache indices at which queries are written; the first G heads' are those of keys
    and values. `attention` holds the softmax of the `tracked_rows`, `window_attention` that of the `window_rows`,
    both numbers of rows among A. The last layer also takes `output_rows`: it computes queries, keys and values of
    all rows, and the rest for these rows only, among which `tracked_rows` and `window_rows` then count.
    """
    last = index == config.layers - 1
    rows = "O" if last else "A"
    output_rows = (TensorSpec("output_rows", "int64", ("O",)),) if last else ()
    caches, written = layer_caches(config, "")
    return GraphSignature(
        layer_name(index),
        (
            TensorSpec("hidden", "fp32", (1, "A", config.d_model)),
            *row_indices(config),
            TensorSpec("tracked_rows", "int64", ("T",)),
            TensorSpec("window_rows", "int64", ("W",)),
            *output_rows,
            *caches,
        ),
        (
            TensorSpec("hidden_out", "fp32", (1, rows, config.d_model)),
            TensorSpec("attention", "fp32", (1, config.heads, "T", "S")),
            TensorSpec("window_attention", "fp32", (1, config.heads, "W", "S")),
            *written,
        ),
        in_place(caches, written),
        "cpu",
    )


def row_indices(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """The inputs that say where rows are written: `positions` [1, A] and cache `indices` [1, H, A, 3].

    Where attention is block-causal, also which keys they see: those before `block_ends` [A].
    """
    places = TensorSpec("positions", "int64", (1, "A")), TensorSpec("indices", "int64", (1, config.heads, "A", 3))
    return (*places, TensorSpec("block_ends", "int64", ("A",))) if config.block_length else places


def layer_caches(config: ModelConfig, suffix: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The caches of a layer as inputs and as outputs: its output `h`, its queries `q`, keys `k` and values `v`."""
    axes: dict[str, tuple[str | int, ...]] = {
        "h": ("S", config.d_model), "q": (1, config.heads, "S", config.head_size),
        "k": (1, config.kv_heads, "S", config.head_size), "v": (1, config.kv_heads, "S", config.head_size),
    }  # fmt: skip
    inputs, outputs = (
        tuple(TensorSpec(f"{name}_{kind}{suffix}", "fp32", shape) for name, shape in axes.items())
        for kind in ("cache", "cache_out")
    )
    return inputs, outputs


def in_place(caches: tuple[TensorSpec, ...], written: tuple[TensorSpec, ...]) -> tuple[tuple[str, str], ...]:
    """The aliases of caches that are written in place."""
    return tuple((after.name, before.name) for before, after in zip(caches, written, strict=True))


def reuse_signature(config: ModelConfig) -> GraphSignature:
    """A pass of few rows through all parts, from the ids of A rows to the tokens of the W `logits_rows` among them.

    `attention` is that of the `tracked_rows` in each layer; `probe` holds the K = `track_num` most attended keys of
    each layer. `window_rows` [A] is 1 for rows whose attention the probe adds up, 0 for others. `h_cache` holds the
    input of the first layer.
    """
    first_input, first_output = (TensorSpec(name, "fp32", ("S", config.d_model)) for name in ("h_cache", "h_cache_out"))
    layers = [layer_caches(config, f"_{index:02d}") for index in range(config.layers)]
    caches = first_input, *(spec for inputs, _ in layers for spec in inputs)
    written = first_output, *(spec for _, outputs in layers for spec in outputs)
    return GraphSignature(
        "reuse",
        (
            TensorSpec("ids", "int64", (1, "A")),
            *row_indices(config),
            TensorSpec("tracked_rows", "int64", ("T",)),
            TensorSpec("window_rows", "fp32", ("A",)),
            TensorSpec("logits_rows", "int64", ("W",)),
            *PROBE_INPUTS,
            *caches,
        ),
        (
            TensorSpec("attention", "fp32", (config.layers, config.heads, "T", "S")),
            TensorSpec("probe", "int64", (config.layers, "K")),
            TensorSpec("token", "int64", (1, "W")),
            TensorSpec("confidence", "fp32", (1, "W")),
            *written,
        ),
        in_place(caches, written),
        "cpu",
    )


def attention_signature(config: ModelConfig) -> GraphSignature:
    """Attention rows of the tracked tokens in L layers, from their caches; it runs before a pass changes these."""
    inputs = (
        TensorSpec("q_cache", "fp32", ("L", config.heads, "S", config.head_size)),
        TensorSpec("k_cache", "fp32", ("L", config.kv_heads, "S", config.head_size)),
        TensorSpec("tracked", "int64", ("T",)),
    )
    outputs = (TensorSpec("attention_prev", "fp32", ("L", config.heads, "T", "S")),)
    return GraphSignature("attention", inputs, outputs, dialect="cpu")


def cpu_drift_signature(config: ModelConfig, kind: str) -> GraphSignature:
    """The drift test of L layers: `sigma`, the similarity of the tracked tokens' attention before and after a pass."""
    axes = "L", config.heads, "T", "S"
    inputs = TensorSpec("attention_prev", "fp32", axes), TensorSpec("attention", "fp32", axes)
    return GraphSignature(f"drift_{kind}", inputs, (TensorSpec("sigma", "fp32", ("L",)),), dialect="cpu")


def cpu_probe_signature(config: ModelConfig) -> GraphSignature:
    """The K = `track_num` keys of each of L layers that receive most of the window's attention."""
    attention = TensorSpec("window_attention", "fp32", ("L", config.heads, "W", "S"))
    return GraphSignature(
        "probe", (attention, *PROBE_INPUTS), (TensorSpec("probe", "int64", ("L", "K")),), dialect="cpu"
    )


def cpu_signatures(config: ModelConfig, with_reuse: bool) -> tuple[GraphSignature, ...]:
    """All graphs of a language model in the CPU dialect; `with_reuse` adds the reuse graph."""
    layers = (cpu_layer_signature(config, i) for i in range(config.layers))
    drifts = (cpu_drift_signature(config, kind) for kind in DRIFTS)
    return (
        embed_signature(config, "fp32"),
        *layers,
        head_signature(config, "fp32"),
        attention_signature(config),
        *drifts,
        cpu_probe_signature(config),
        *([reuse_signature(config)] if with_reuse else []),
    )
