"""The vision parts as exported, the same for every back end.

Each function writes one part of `engines.signatures.gpu.vision_specs` and says the same
as its namesake in `engines.eager.vision_layers`. Attention is one operator, which a CPU runs
as fast as its pieces: nobody looks at a tower's rows. Nothing here knows a
checkpoint's names or a back end.
"""

from engines.config import ModelConfig, VisionConfig
from export.graphs.builder import Graph


def tower(g: Graph, model: ModelConfig) -> None:
    config = model.vision
    assert config is not None, "a tower is listed for models that have one"
    hidden = embed(g, config)
    for index in range(config.layers):
        hidden = layer(g, config, index, hidden)
    g.op("Identity", hidden, name="features")


def embed(g: Graph, config: VisionConfig) -> str:
    """[N, P, Dv]: each patch as one row of numbers, times a matrix, and its position."""
    grid, size = config.grid, config.patch_size
    used = "pixels"
    if grid * size != config.image_size:
        used = g.op("Slice", used, g.constant([0, 0]), g.constant([grid * size] * 2), g.constant([2, 3]))
    split = g.reshape(used, 0, config.channels, grid, size, grid, size)
    patches = g.op("Transpose", split, perm=[0, 2, 4, 1, 3, 5])
    rows = g.reshape(patches, 0, config.patches, config.channels * size * size)
    return g.op("Add", g.linear(rows, "patch"), g.weight("positions"))


def layer(g: Graph, config: VisionConfig, index: int, hidden: str) -> str:
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
    weight, bias = g.weight(f"{name}.weight"), g.weight(f"{name}.bias")
    return g.op("LayerNormalization", x, weight, bias, axis=-1, epsilon=config.norm_eps, stash_type=1)


def projector(g: Graph) -> None:
    wide = g.op("Gelu", g.linear("features", "fc1"))
    g.op("Identity", g.linear(wide, "fc2"), name="projected")
