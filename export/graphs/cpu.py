"""The parts as the CPU runs them: attention is written out, so that its rows can be read.

There every slot is a key, so nothing is masked; MatMul and Softmax are as fast
as the fused operator, and the rows of tracked tokens and of the window, which
the layer has computed anyway, are what the drift test and the probe look at.
Rows are written where they lie in the caches, in place. `reuse` is all layers in
one graph: with few rows, the calls cost as much as what they compute.
"""

import numpy as np
from onnx import helper

from engines.config import ModelConfig, layer_name
from export.graphs import gpu
from export.graphs.builder import Graph


def layer(g: Graph, config: ModelConfig, last: bool) -> None:
    weights, _ = block(g, config, "hidden", "hidden_out", "", "output_rows" if last else "")
    g.op("Gather", weights, "tracked_rows", name="attention", axis=2)
    g.op("Gather", weights, "window_rows", name="window_attention", axis=2)


def reuse(g: Graph, config: ModelConfig) -> None:
    """From ids to tokens; what the drift test needs of each layer, and the probe."""
    tracked, mass = [], []
    g.enter("embed")
    hidden = gpu.embed(g)
    keep(g, config, hidden, g.reshape("positions", -1, 1), "")
    counted = g.op("Unsqueeze", "window_rows", g.constant([0]))  # [1, A]
    for index in range(config.layers):
        g.enter(layer_name(index))
        weights, hidden = block(g, config, hidden, f"leaving_{index:02d}", f"_{index:02d}", packed=not config.qk_norm)
        tracked.append(g.op("Gather", weights, "tracked_rows", axis=2))
        mass.append(g.op("ReduceSum", g.op("MatMul", counted, weights), g.constant([1, 2]), keepdims=0))
    g.enter("head")
    gpu.predict(g, config, g.op("Gather", hidden, "logits_rows", axis=1))
    g.op("Concat", *tracked, name="attention", axis=0)
    most_attended(g, g.op("Concat", *mass, axis=0))


def block(
    g: Graph, config: ModelConfig, hidden: str, leaving: str, suffix: str, wanted: str = "", packed: bool = False
) -> tuple[str, str]:
    """One layer on the rows `hidden`; the softmax of attention [1, H, A, S] and what leaves the layer, `leaving`.

    With `wanted`, both are those of these rows only.
    """
    q, k, v = (projections if packed else gpu.projections)(g, config, hidden)
    indices = "indices"
    g.op("ScatterND", f"q_cache{suffix}", indices, q, name=f"q_cache_out{suffix}")
    if config.heads != config.kv_heads:
        indices = g.op("Slice", indices, g.constant([0]), g.constant([config.kv_heads]), g.constant([1]))
    keys, values = (
        g.op("ScatterND", f"{name}_cache{suffix}", indices, rows, name=f"{name}_cache_out{suffix}")
        for name, rows in (("k", k), ("v", v))
    )
    slots = g.reshape("positions", -1, 1)
    if wanted:
        q, hidden = g.op("Gather", q, wanted, axis=2), g.op("Gather", hidden, wanted, axis=1)
        slots = g.op("Gather", slots, wanted, axis=0)
    weights = softmax(g, config, q, keys)
    attended = g.op("MatMul", weights, values)
    left = gpu.finish(g, config, hidden, regroup(g, attended, config.kv_heads, config.heads, config.head_size), leaving)
    keep(g, config, left, slots, suffix)
    return by_head(g, config, weights, keys), left


def keep(g: Graph, config: ModelConfig, hidden: str, slots: str, suffix: str) -> None:
    """Write rows [1, A, d] to a cache of hidden states."""
    rows = g.reshape(hidden, -1, config.d_model)
    g.op("ScatterND", f"h_cache{suffix}", slots, rows, name=f"h_cache_out{suffix}")


def projections(g: Graph, config: ModelConfig, hidden: str) -> tuple[str, str, str]:
    """As `fused.projections`, in one product and one rotary: with few rows each operator is mostly overhead."""
    names, heads = ("q_proj", "k_proj", "v_proj"), (config.heads, config.kv_heads, config.kv_heads)
    product = g.op(
        "MatMul", g.norm(hidden, "attn_norm", config.norm_eps),
        g.op("Concat", *(g.weight(f"{name}.weight") for name in names), axis=1),
    )  # fmt: skip
    if "q_proj.bias" in g.weights:
        product = g.op("Add", product, g.op("Concat", *(g.weight(f"{name}.bias") for name in names), axis=0))
    all_heads = g.swap(g.reshape(product, 0, 0, sum(heads), config.head_size))
    turned, v = g.split(all_heads, heads[0] + heads[1], heads[2], axis=1)
    q, k = g.split(gpu.rotate(g, config, turned), *heads[:2], axis=1)
    return q, k, v


def softmax(g: Graph, config: ModelConfig, q: str, keys: str) -> str:
    """Attention of q [B, H, N, D] over all keys, [B, G, H/G·N, S]: heads that share keys lie one after the other."""
    scaled = g.op("Mul", q, g.constant(config.head_size**-0.5, np.float32))
    grouped = regroup(g, scaled, config.heads, config.kv_heads, config.head_size)
    return g.op("Softmax", g.op("MatMul", grouped, g.op("Transpose", keys, perm=[0, 1, 3, 2])), axis=-1)


def regroup(g: Graph, x: str, before: int, after: int, size: int) -> str:
    """[B, before, N, D] as [B, after, N · before / after, D]."""
    return x if before == after else g.reshape(x, 0, after, -1, size)


def by_head(g: Graph, config: ModelConfig, weights: str, keys: str) -> str:
    """What `softmax` gave as [B, H, N, S]."""
    if config.heads == config.kv_heads:
        return weights
    every = g.op("Shape", keys, start=2, end=3)
    return g.op("Reshape", weights, g.op("Concat", g.constant([0, config.heads, -1]), every, axis=0))


def attention(g: Graph, config: ModelConfig) -> None:
    q = g.op("Gather", "q_cache", "tracked", axis=2)
    g.op("Identity", by_head(g, config, softmax(g, config, q, "k_cache"), "k_cache"), name="attention_prev")


def drift(g: Graph, kind: str) -> None:
    alike = gpu.similarity(g, kind, "attention_prev", "attention")
    g.op("ReduceMean", alike, g.constant([1, 2]), name="sigma", keepdims=0)


def probe(g: Graph) -> None:
    most_attended(g, g.op("ReduceSum", "window_attention", g.constant([1, 2]), keepdims=0))


def most_attended(g: Graph, mass: str) -> None:
    """`probe`: the keys with the most of `mass` [B, S]."""
    eligible = g.op("Where", "probe_keys", mass, g.constant(-1.0, np.float32))
    g.nodes.append(helper.make_node("TopK", [eligible, "track_num"], ["probe_mass", "probe"], name="topk", axis=-1))
