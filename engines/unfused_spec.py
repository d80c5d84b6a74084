"""The parts as the CPU runs them, and their ports: in fp32, one sequence, every slot a key.

Axes are those of `engines.spec`, and R readers: rows that predict. Nothing here
knows a file format or a back end.
"""

from engines.config import ModelConfig, layer_name
from engines.spec import DRIFTS, PartSpec, Port, embed_spec, head_spec

PROBED = Port("probe_keys", "bool", ("S",)), Port("track_num", "int64", (1,))


def unfused_layer_spec(config: ModelConfig, index: int) -> PartSpec:
    """A transformer block in fp32 on rows at `positions`, all slots being keys.

    `places` [1, H, A, 3] are the indices at which queries are written, the first G heads' those of keys and values.
    `attention` is the softmax of T tracked rows, `window_attention` that of the
    window's N, all of them numbers of rows among A. Of rows that are not among its
    W `wanted` ones, the last layer computes queries, keys and values only; there
    the others count within these.
    """
    rows = "W" if index == config.layers - 1 else "A"
    wanted = (Port("wanted", "int64", ("W",)),) if rows == "W" else ()
    caches, written = unfused_caches(config, "")
    return PartSpec(
        layer_name(index),
        (
            Port("hidden", "fp32", (1, "A", config.d_model)),
            *unfused_places(config),
            Port("tracked_rows", "int64", ("T",)),
            Port("window_rows", "int64", ("N",)),
            *wanted,
            *caches,
        ),
        (
            Port("hidden_out", "fp32", (1, rows, config.d_model)),
            Port("attention", "fp32", (1, config.heads, "T", "S")),
            Port("window_attention", "fp32", (1, config.heads, "N", "S")),
            *written,
        ),
        in_place(caches, written),
        "unfused",
    )


def unfused_places(config: ModelConfig) -> tuple[Port, ...]:
    return Port("positions", "int64", (1, "A")), Port("places", "int64", (1, config.heads, "A", 3))


def unfused_caches(config: ModelConfig, suffix: str) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """A layer's caches, and what they are after it: `h` is of what leaves it, `q` of the queries."""
    axes: dict[str, tuple[str | int, ...]] = {
        "h": ("S", config.d_model), "q": (1, config.heads, "S", config.head_size),
        "k": (1, config.kv_heads, "S", config.head_size), "v": (1, config.kv_heads, "S", config.head_size),
    }  # fmt: skip
    before, after = (
        tuple(Port(f"{name}_{port}{suffix}", "fp32", shape) for name, shape in axes.items())
        for port in ("cache", "cache_out")
    )
    return before, after


def in_place(caches: tuple[Port, ...], written: tuple[Port, ...]) -> tuple[tuple[str, str], ...]:
    return tuple((after.name, before.name) for before, after in zip(caches, written, strict=True))


def reuse_spec(config: ModelConfig) -> PartSpec:
    """A pass of few rows in fp32, from ids through all L layers to tokens for R `readers`, rows among A.

    `attention` is that of T `tracked_rows`, and `probe` has the K = `track_num`
    most-attended keys of each layer. `window_rows` [A] is 1 for rows whose
    attention the probe counts, 0 for others. `h_cache` holds what enters the
    first layer.
    """
    entering = Port("h_cache", "fp32", ("S", config.d_model)), Port("h_cache_out", "fp32", ("S", config.d_model))
    per_layer = [unfused_caches(config, f"_{index:02d}") for index in range(config.layers)]
    caches, written = (
        (first, *(port for ports in side for port in ports))
        for first, side in zip(entering, zip(*per_layer, strict=True), strict=True)
    )
    return PartSpec(
        "reuse",
        (
            Port("ids", "int64", (1, "A")),
            *unfused_places(config),
            Port("tracked_rows", "int64", ("T",)),
            Port("window_rows", "fp32", ("A",)),
            Port("readers", "int64", ("R",)),
            *PROBED,
            *caches,
        ),
        (
            Port("attention", "fp32", (config.layers, config.heads, "T", "S")),
            Port("probe", "int64", (config.layers, "K")),
            Port("token", "int64", (1, "R")),
            Port("confidence", "fp32", (1, "R")),
            *written,
        ),
        in_place(caches, written),
        "unfused",
    )


def recall_spec(config: ModelConfig) -> PartSpec:
    """Attention rows of the tracked tokens before a pass; B counts layers here, and in the next two."""
    inputs = (
        Port("q_cache", "fp32", ("B", config.heads, "S", config.head_size)),
        Port("k_cache", "fp32", ("B", config.kv_heads, "S", config.head_size)),
        Port("tracked", "int64", ("T",)),
    )
    return PartSpec("recall", inputs, (Port("before", "fp32", ("B", config.heads, "T", "S")),), form="unfused")


def unfused_drift_spec(config: ModelConfig, kind: str) -> PartSpec:
    """The drift test of B layers: the tracked tokens' attention rows before a pass, and as it has left them."""
    rows = (Port(name, "fp32", ("B", config.heads, "T", "S")) for name in ("before", "attention"))
    return PartSpec(f"drift_{kind}", tuple(rows), (Port("sigma", "fp32", ("B",)),), form="unfused")


def unfused_probe_spec(config: ModelConfig) -> PartSpec:
    """The K = `track_num` keys of B layers that get most of the window's attention."""
    attention = Port("window_attention", "fp32", ("B", config.heads, "N", "S"))
    return PartSpec("probe", (attention, *PROBED), (Port("probe", "int64", ("B", "K")),), form="unfused")


def unfused_specs(config: ModelConfig, together: bool) -> tuple[PartSpec, ...]:
    """All parts as the CPU runs them, in fp32; with all layers `together` in one graph besides."""
    layers = (unfused_layer_spec(config, i) for i in range(config.layers))
    drifts = (unfused_drift_spec(config, kind) for kind in DRIFTS)
    watches = recall_spec(config), *drifts, unfused_probe_spec(config)
    return (
        embed_spec(config, "fp32"),
        *layers,
        head_spec(config, "fp32"),
        *watches,
        *([reuse_spec(config)] * together),
    )
