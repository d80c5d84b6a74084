"""The parts as the CPU runs them, and their ports: in fp32, one sequence, every slot a key.

Axes are those of `engines.signatures.gpu`, and R readers: rows that predict. Nothing here
knows a file format or a back end.
"""

from engines.config import ModelConfig, layer_name
from engines.signatures import GraphSignature, TensorSpec
from engines.signatures.gpu import DRIFTS, embed_signature, head_signature

PROBED = TensorSpec("probe_keys", "bool", ("S",)), TensorSpec("track_num", "int64", (1,))


def cpu_layer_signature(config: ModelConfig, index: int) -> GraphSignature:
    """A transformer block in fp32 on rows at `positions`, all slots being keys.

    `places` [1, H, A, 3] are the indices at which queries are written, the first G heads' those of keys and values.
    `attention` is the softmax of T tracked rows, `window_attention` that of the
    window's N, all of them numbers of rows among A. Of rows that are not among its
    W `wanted` ones, the last layer computes queries, keys and values only; there
    the others count within these.
    """
    rows = "W" if index == config.layers - 1 else "A"
    wanted = (TensorSpec("wanted", "int64", ("W",)),) if rows == "W" else ()
    caches, written = layer_caches(config, "")
    return GraphSignature(
        layer_name(index),
        (
            TensorSpec("hidden", "fp32", (1, "A", config.d_model)),
            *row_indices(config),
            TensorSpec("tracked_rows", "int64", ("T",)),
            TensorSpec("window_rows", "int64", ("N",)),
            *wanted,
            *caches,
        ),
        (
            TensorSpec("hidden_out", "fp32", (1, rows, config.d_model)),
            TensorSpec("attention", "fp32", (1, config.heads, "T", "S")),
            TensorSpec("window_attention", "fp32", (1, config.heads, "N", "S")),
            *written,
        ),
        in_place(caches, written),
        "cpu",
    )


def row_indices(config: ModelConfig) -> tuple[TensorSpec, ...]:
    return TensorSpec("positions", "int64", (1, "A")), TensorSpec("indices", "int64", (1, config.heads, "A", 3))


def layer_caches(config: ModelConfig, suffix: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """A layer's caches, and what they are after it: `h` is of what leaves it, `q` of the queries."""
    axes: dict[str, tuple[str | int, ...]] = {
        "h": ("S", config.d_model), "q": (1, config.heads, "S", config.head_size),
        "k": (1, config.kv_heads, "S", config.head_size), "v": (1, config.kv_heads, "S", config.head_size),
    }  # fmt: skip
    before, after = (
        tuple(TensorSpec(f"{name}_{port}{suffix}", "fp32", shape) for name, shape in axes.items())
        for port in ("cache", "cache_out")
    )
    return before, after


def in_place(caches: tuple[TensorSpec, ...], written: tuple[TensorSpec, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((after.name, before.name) for before, after in zip(caches, written, strict=True))


def reuse_signature(config: ModelConfig) -> GraphSignature:
    """A pass of few rows in fp32, from ids through all L layers to tokens for R `readers`, rows among A.

    `attention` is that of T `tracked_rows`, and `probe` has the K = `track_num`
    most-attended keys of each layer. `window_rows` [A] is 1 for rows whose
    attention the probe counts, 0 for others. `h_cache` holds what enters the
    first layer.
    """
    entering = (
        TensorSpec("h_cache", "fp32", ("S", config.d_model)),
        TensorSpec("h_cache_out", "fp32", ("S", config.d_model)),
    )
    per_layer = [layer_caches(config, f"_{index:02d}") for index in range(config.layers)]
    caches, written = (
        (first, *(port for ports in side for port in ports))
        for first, side in zip(entering, zip(*per_layer, strict=True), strict=True)
    )
    return GraphSignature(
        "reuse",
        (
            TensorSpec("ids", "int64", (1, "A")),
            *row_indices(config),
            TensorSpec("tracked_rows", "int64", ("T",)),
            TensorSpec("window_rows", "fp32", ("A",)),
            TensorSpec("logits_rows", "int64", ("R",)),
            *PROBED,
            *caches,
        ),
        (
            TensorSpec("attention", "fp32", (config.layers, config.heads, "T", "S")),
            TensorSpec("probe", "int64", (config.layers, "K")),
            TensorSpec("token", "int64", (1, "R")),
            TensorSpec("confidence", "fp32", (1, "R")),
            *written,
        ),
        in_place(caches, written),
        "cpu",
    )


def recall_signature(config: ModelConfig) -> GraphSignature:
    """Attention rows of the tracked tokens before a pass; B counts layers here, and in the next two."""
    inputs = (
        TensorSpec("q_cache", "fp32", ("B", config.heads, "S", config.head_size)),
        TensorSpec("k_cache", "fp32", ("B", config.kv_heads, "S", config.head_size)),
        TensorSpec("tracked", "int64", ("T",)),
    )
    return GraphSignature(
        "recall", inputs, (TensorSpec("before", "fp32", ("B", config.heads, "T", "S")),), dialect="cpu"
    )


def cpu_drift_signature(config: ModelConfig, kind: str) -> GraphSignature:
    """The drift test of B layers: the tracked tokens' attention rows before a pass, and as it has left them."""
    rows = (TensorSpec(name, "fp32", ("B", config.heads, "T", "S")) for name in ("before", "attention"))
    return GraphSignature(f"drift_{kind}", tuple(rows), (TensorSpec("sigma", "fp32", ("B",)),), dialect="cpu")


def cpu_probe_signature(config: ModelConfig) -> GraphSignature:
    """The K = `track_num` keys of B layers that get most of the window's attention."""
    attention = TensorSpec("window_attention", "fp32", ("B", config.heads, "N", "S"))
    return GraphSignature("probe", (attention, *PROBED), (TensorSpec("probe", "int64", ("B", "K")),), dialect="cpu")


def cpu_signatures(config: ModelConfig, together: bool) -> tuple[GraphSignature, ...]:
    """All parts as the CPU runs them, in fp32; with all layers `together` in one graph besides."""
    layers = (cpu_layer_signature(config, i) for i in range(config.layers))
    drifts = (cpu_drift_signature(config, kind) for kind in DRIFTS)
    watches = recall_signature(config), *drifts, cpu_probe_signature(config)
    return (
        embed_signature(config, "fp32"),
        *layers,
        head_signature(config, "fp32"),
        *watches,
        *([reuse_signature(config)] * together),
    )
