"""Graphs of the parts for the CPU: attention is written out, so that its rows are outputs.

Each function builds the graph of its namesake in `engines.signatures.cpu`. Every
slot is a key, so nothing is masked. MatMul and Softmax are as fast as the fused
operator there, and the drift test and the probe use the attention rows that the
layer computes anyway. Caches are written in place, at the rows' positions.
"""

import numpy as np

from engines.config import ModelConfig, layer_name
from export.graphs import gpu
from export.graphs.builder import Graph, Writer


def layer(g: Graph, config: ModelConfig) -> None:
    """hidden [1, A, d] -> hidden_out, the attention rows of `tracked_rows` and `window_rows`, and the caches."""
    output_rows = next((spec.name for spec in g.signature.inputs if spec.name == "output_rows"), "")
    weights, _ = run_layer(g, config, "hidden", output="hidden_out", output_rows=output_rows)
    g.op("Gather", weights, "tracked_rows", name="attention", axis=2)
    g.op("Gather", weights, "window_rows", name="window_attention", axis=2)


def reuse(g: Graph, config: ModelConfig) -> None:
    """The reuse graph: all parts, from ids [1, A] to tokens. With few rows, calls cost as much as what they compute.

    Also the attention rows [L, H, T, S] of the tracked tokens, and the probe [L, K].
    """
    tracked, mass = [], []
    g.use_weights_of("embed")
    hidden = gpu.embed(g, config)
    write_hidden(g, config, hidden, g.reshape("positions", -1, 1), "")
    counted = g.op("Unsqueeze", "window_rows", g.constant([0]))  # [1, A]
    for index in range(config.layers):
        g.use_weights_of(layer_name(index))
        weights, hidden = run_layer(
            g, config, hidden, output=f"hidden_{index:02d}", suffix=f"_{index:02d}", packed=not config.qk_norm
        )
        tracked.append(g.op("Gather", weights, "tracked_rows", axis=2))
        mass.append(g.op("ReduceSum", g.op("MatMul", counted, weights), g.constant([1, 2]), keepdims=0))
    g.use_weights_of("head")
    gpu.predict(g, config, g.op("Gather", hidden, "logits_rows", axis=1))
    g.op("Concat", *tracked, name="attention", axis=0)
    gpu.most_attended(g, g.op("Concat", *mass, axis=0), "track_num")


def run_layer(
    g: Graph,
    config: ModelConfig,
    hidden: str,
    output: str,
    suffix: str = "",
    output_rows: str = "",
    packed: bool = False,
) -> tuple[str, str]:
    """One layer on the rows `hidden` [1, A, d]: the softmax of attention [1, H, A, S] and the output [1, A, d].

    With `output_rows`, both are of these rows only. `suffix` is that of the
    caches' names, `packed` computes Q, K and V in one product.
    """
    q, k, v = (packed_projections if packed else gpu.projections)(g, config, hidden)
    indices = "indices"
    g.op("ScatterND", f"q_cache{suffix}", indices, q, name=f"q_cache_out{suffix}")
    if config.heads != config.kv_heads:
        indices = g.op("Slice", indices, g.constant([0]), g.constant([config.kv_heads]), g.constant([1]))
    keys, values = (
        g.op("ScatterND", f"{name}_cache{suffix}", indices, rows, name=f"{name}_cache_out{suffix}")
        for name, rows in (("k", k), ("v", v))
    )
    slots = g.reshape("positions", -1, 1)
    ends = "block_ends" if config.block_length else ""
    if output_rows:
        ends = ends and g.op("Gather", ends, output_rows, axis=0)
        q, hidden = g.op("Gather", q, output_rows, axis=2), g.op("Gather", hidden, output_rows, axis=1)
        slots = g.op("Gather", slots, output_rows, axis=0)
    weights = softmax(g, config, q, keys, ends)
    attended = regroup(g, g.op("MatMul", weights, values), config.kv_heads, config.heads, config.head_size)
    result = gpu.layer_output(g, config, hidden, attended, output)
    write_hidden(g, config, result, slots, suffix)
    return by_head(g, config, weights, keys), result


def write_hidden(g: Graph, config: ModelConfig, hidden: str, slots: str, suffix: str) -> None:
    """Write hidden [1, A, d] to `slots` [A, 1] of a cache of hidden states [S, d]."""
    rows = g.reshape(hidden, -1, config.d_model)
    g.op("ScatterND", f"h_cache{suffix}", slots, rows, name=f"h_cache_out{suffix}")


def packed_projections(g: Graph, config: ModelConfig, hidden: str) -> tuple[str, str, str]:
    """As `gpu.projections`, in one product and one rotary: with few rows, an operator is mostly overhead."""
    names, heads = ("q_proj", "k_proj", "v_proj"), (config.heads, config.kv_heads, config.kv_heads)
    product = g.op(
        "MatMul", g.norm(hidden, "attn_norm", config.norm_eps),
        g.op("Concat", *(g.weight(f"{name}.weight") for name in names), axis=1),
    )  # fmt: skip
    if "q_proj.bias" in g.weights:
        product = g.op("Add", product, g.op("Concat", *(g.weight(f"{name}.bias") for name in names), axis=0))
    all_heads = g.swap(g.reshape(product, 0, 0, sum(heads), config.head_size))
    unrotated, v = g.split(all_heads, heads[0] + heads[1], heads[2], axis=1)
    q, k = g.split(gpu.rotate(g, config, unrotated), *heads[:2], axis=1)
    return q, k, v


def softmax(g: Graph, config: ModelConfig, q: str, keys: str, ends: str = "") -> str:
    """Attention of q [B, H, A, D] over all keys [B, G, S, D]: [B, G, H/G·A, S], heads of one group in succession.

    With `ends` [A] a row attends to the keys before its end only.
    """
    scaled = g.op("Mul", q, g.constant(config.head_size**-0.5, np.float32))
    grouped = regroup(g, scaled, config.heads, config.kv_heads, config.head_size)
    scores = g.op("MatMul", grouped, g.op("Transpose", keys, perm=[0, 1, 3, 2]))
    if ends:
        slots = g.op("Shape", keys, start=2, end=3)
        keys_at = g.op("Range", g.constant(0), g.op("Squeeze", slots), g.constant(1))
        seen = g.op("Less", keys_at, g.op("Unsqueeze", ends, g.constant([1])))  # [A, S]
        seen = g.op("Tile", seen, g.constant([config.heads // config.kv_heads, 1]))
        scores = g.op("Where", seen, scores, g.constant(-np.inf, np.float32))
    return g.op("Softmax", scores, axis=-1)


def regroup(g: Graph, x: str, before: int, after: int, size: int) -> str:
    """[B, before, A, D] as [B, after, A · before / after, D]."""
    return x if before == after else g.reshape(x, 0, after, -1, size)


def by_head(g: Graph, config: ModelConfig, weights: str, keys: str) -> str:
    """The result of `softmax` as [B, H, A, S]."""
    if config.heads == config.kv_heads:
        return weights
    slots = g.op("Shape", keys, start=2, end=3)
    return g.op("Reshape", weights, g.op("Concat", g.constant([0, config.heads, -1]), slots, axis=0))


def attention(g: Graph, config: ModelConfig) -> None:
    """attention_prev [L, H, T, S]: the attention of the `tracked` rows of the query cache."""
    q = g.op("Gather", "q_cache", "tracked", axis=2)
    g.op("Identity", by_head(g, config, softmax(g, config, q, "k_cache"), "k_cache"), name="attention_prev")


def drift(g: Graph, config: ModelConfig) -> None:
    """sigma [L] of the drift test that the signature names, from attention rows before and after a pass."""
    similar = gpu.similarity(g, g.signature.name.partition("_")[2], "attention_prev", "attention")
    g.op("ReduceMean", similar, g.constant([1, 2]), name="sigma", keepdims=0)


def probe(g: Graph, config: ModelConfig) -> None:
    """probe [L, K]: the slots with the most of `window_attention` [L, H, W, S], among those in `probe_keys`."""
    mass = g.op("ReduceSum", "window_attention", g.constant([1, 2]), keepdims=0)
    gpu.most_attended(g, mass, "track_num")


WRITERS: dict[str, Writer] = {
    "layer": layer, "reuse": reuse, "attention": attention, "drift": drift, "probe": probe,
}  # fmt: skip
