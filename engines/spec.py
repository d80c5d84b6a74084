"""What the parts of a model and their ports are: plain data shared by all rooms.

Axes carry the same letters everywhere: B batch, A active rows, S slots,
H heads, G key/value heads, D head size, d width, V columns of the logits,
T tracked rows, W window rows, K tracked keys per layer; of images: N tiles,
P patches of a tile, Dv the vision tower's width. Nothing here knows a file
format, a tensor library or a back end.
"""

from dataclasses import dataclass

from engines.config import ModelConfig, layer_name

DRIFTS = ("row", "head", "min", "focus", "moved")  # as `models.reference.drift` has them


@dataclass(frozen=True)
class Port:
    """An input or output of a part: its element type and named axes (numbers are static)."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]


@dataclass(frozen=True)
class PartSpec:
    """The ports of one graph. `aliases` maps each output written in place to its input.

    `form` is "fused" where attention is one operator, as GPUs have it, or "unfused"
    where it is written out and gives its rows away, as the CPU runs it (`engines.unfused_spec`).
    """

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    form: str = "fused"


def embed_spec(config: ModelConfig, dtype: str) -> PartSpec:
    return PartSpec("embed", (Port("ids", "int64", ("B", "A")),), (Port("hidden", dtype, ("B", "A", config.d_model)),))


def layer_spec(config: ModelConfig, dtype: str, index: int) -> PartSpec:
    """A transformer block on the first A slots: caches are written in place from `write_index`."""
    cache = ("B", config.kv_heads, "S", config.head_size)
    return PartSpec(
        layer_name(index),
        (
            Port("hidden", dtype, ("B", "A", config.d_model)),
            Port("positions", "int64", ("B", "A")),
            Port("key_mask", "bool", ("B", "S")),
            Port("write_index", "int64", ("B",)),
            Port("k_cache", dtype, cache),
            Port("v_cache", dtype, cache),
        ),
        (
            Port("hidden_out", dtype, ("B", "A", config.d_model)),
            Port("q", dtype, ("B", "A", config.heads, config.head_size)),
            Port("k_cache_out", dtype, cache),
            Port("v_cache_out", dtype, cache),
        ),
        (("k_cache_out", "k_cache"), ("v_cache_out", "v_cache")),
    )


def head_spec(config: ModelConfig, dtype: str) -> PartSpec:
    """Final norm and logits of the chosen `rows`; arg-max without [MASK], its softmax probability."""
    return PartSpec(
        "head",
        (Port("hidden", dtype, ("B", "A", config.d_model)), Port("rows", "int64", ("B", "W"))),
        (
            Port("token", "int64", ("B", "W")),
            Port("confidence", "fp32", ("B", "W")),
            Port("logits", "fp32", ("B", "W", config.vocab)),
        ),
    )


def drift_spec(config: ModelConfig, dtype: str, kind: str) -> PartSpec:
    """The drift test of one layer: `k_prev` holds the first A slots' keys before the pass."""
    rows = ("B", "T", config.heads, config.head_size)
    return PartSpec(
        f"drift_{kind}",
        (
            Port("q_prev", dtype, rows),
            Port("q_now", dtype, rows),
            Port("tracked_rows", "bool", ("B", "T")),
            Port("k_prev", dtype, ("B", config.kv_heads, "A", config.head_size)),
            Port("k_cache", dtype, ("B", config.kv_heads, "S", config.head_size)),
            Port("key_mask", "bool", ("B", "S")),
        ),
        (Port("sigma", "fp32", ("B",)),),
    )


def probe_spec(config: ModelConfig, dtype: str, track_num: int) -> PartSpec:
    """The most-attended keys of one layer, as slots, most attended first."""
    return PartSpec(
        "probe",
        (
            Port("q_window", dtype, ("B", "W", config.heads, config.head_size)),
            Port("window_rows", "bool", ("B", "W")),
            Port("k_cache", dtype, ("B", config.kv_heads, "S", config.head_size)),
            Port("key_mask", "bool", ("B", "S")),
            Port("probe_keys", "bool", ("B", "S")),
        ),
        (Port("probe", "int64", ("B", track_num)),),
    )


def vision_specs(config: ModelConfig, dtype: str) -> tuple[PartSpec, ...]:
    """The parts that turn tiles into rows of the language model; none for a model without a vision tower."""
    vision = config.vision
    if vision is None:
        return ()
    side = vision.image_size
    features = Port("features", dtype, ("N", vision.patches, vision.width))
    projected = Port("projected", dtype, ("N", vision.patches, config.d_model))
    return (
        PartSpec("tower", (Port("pixels", dtype, ("N", vision.channels, side, side)),), (features,)),
        PartSpec("projector", (features,), (projected,)),
    )


def part_specs(config: ModelConfig, dtype: str, track_num: int) -> tuple[PartSpec, ...]:
    """All parts of a bundle's language model as exported: the ones with weights, then the drift tests and the probe."""
    layers = (layer_spec(config, dtype, i) for i in range(config.layers))
    drifts = (drift_spec(config, dtype, kind) for kind in DRIFTS)
    return (embed_spec(config, dtype), *layers, head_spec(config, dtype), *drifts, probe_spec(config, dtype, track_num))
