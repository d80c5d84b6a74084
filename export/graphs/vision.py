"""Graphs of the vision parts, the same for every back end.

Each function builds the graph of its namesake in `engines.signatures.vision` and
computes what its namesake in `engines.eager.vision_layers` does. Attention is
one operator: no attention row of a tower is an output, and a CPU runs it as fast
as its pieces.
"""

from engines.config import ModelConfig, VisionConfig
from export.graphs.builder import Graph, Writer


def tower(g: Graph, config: ModelConfig) -> None:
    """pixels [N, C, size, size] -> features [N, P, E]."""
    vision = config.vision
    assert vision is not None, "a model without vision has no tower"
    hidden = embed(g, vision)
    for index in range(vision.layers):
        hidden = layer(g, vision, index, hidden)
    g.op("Identity", hidden, name="features")


def embed(g: Graph, config: VisionConfig) -> str:
    """hidden [N, P, E] of `pixels`: each patch as one row of numbers, times a matrix, plus its position."""
    grid, size = config.grid, config.patch_size
    pixels = "pixels"
    if grid * size != config.image_size:
        pixels = g.op("Slice", pixels, g.constant([0, 0]), g.constant([grid * size] * 2), g.constant([2, 3]))
    split = g.reshape(pixels, 0, config.channels, grid, size, grid, size)
    patches = g.op("Transpose", split, perm=[0, 2, 4, 1, 3, 5])
    rows = g.reshape(patches, 0, config.patches, config.channels * size * size)
    return g.op("Add", g.linear(rows, "patch"), g.weight("positions"))


def layer(g: Graph, config: VisionConfig, index: int, hidden: str) -> str:
    """One layer of the tower, hidden [N, P, E] -> [N, P, E]."""
    name = f"layer_{index:02d}"
    normed = norm(g, config, f"{name}.norm1", hidden)
    q, k, v = (
        g.swap(g.reshape(g.linear(normed, f"{name}.{which}_proj"), 0, 0, config.heads, config.width // config.heads))
        for which in "qkv"
    )
    attended = g.reshape(g.swap(g.op("Attention", q, k, v)), 0, 0, config.width)
    hidden = g.op("Add", hidden, g.linear(attended, f"{name}.out_proj"))
    wide = g.op("Gelu", g.linear(norm(g, config, f"{name}.norm2", hidden), f"{name}.fc1"), approximate="tanh")
    return g.op("Add", hidden, g.linear(wide, f"{name}.fc2"))


def norm(g: Graph, config: VisionConfig, name: str, x: str) -> str:
    """Layer norm over the last axis, computed in float32."""
    weight, bias = g.weight(f"{name}.weight"), g.weight(f"{name}.bias")
    return g.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=config.norm_eps, stash_type=1)


def projector(g: Graph, config: ModelConfig) -> None:
    """features [N, P, E] -> projected [N, P, d]."""
    wide = g.op("Gelu", g.linear("features", "fc1"))
    g.op("Identity", g.linear(wide, "fc2"), name="projected")


WRITERS: dict[str, Writer] = {"tower": tower, "projector": projector}
