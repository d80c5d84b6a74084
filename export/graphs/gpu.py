"""Graphs of the parts for GPUs: attention is one masked operator.

Each function builds the graph of its namesake in `engines.signatures.gpu` and
computes what its namesake in `engines.eager.layers` does.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from engines.config import ModelConfig
from export.graphs import experts
from export.graphs.builder import ELEMENTS, Graph, Writer


def embed(g: Graph, config: ModelConfig) -> str:
    """ids [B, A] -> hidden [B, A, d].

    A table in half precision is not cast for a graph in fp32: only the rows that
    are looked up are.
    """
    if g.weights["wte.weight"].dtype == g.dtype:
        return g.op("Gather", g.weight("wte.weight"), "ids", name="hidden")
    rows = g.op("Gather", g.weight("wte.weight"), "ids")
    return g.op("Cast", rows, name="hidden", to=ELEMENTS[g.dtype])


def layer(g: Graph, config: ModelConfig) -> None:
    """hidden [B, A, d] -> hidden_out [B, A, d], q [B, A, H, D] and the caches [B, G, S, D] with A rows written."""
    q, k, v = projections(g, config, "hidden")
    g.op("Transpose", q, name="q", perm=[0, 2, 1, 3])
    keys = g.op("TensorScatter", "k_cache", k, "write_index", name="k_cache_out", axis=2, mode="linear")
    values = g.op("TensorScatter", "v_cache", v, "write_index", name="v_cache_out", axis=2, mode="linear")
    one = g.constant([1])
    rows = g.op("Shape", "hidden", start=1, end=2)
    shape = g.op("Concat", one, one, rows, one, axis=0)
    # [B, 1, A, S]: ONNX Runtime does not broadcast a mask along the rows.
    mask = g.op("Expand", g.op("Unsqueeze", "key_mask", g.constant([1, 2])), shape)
    if config.block_length:
        keys_at = g.op("Unsqueeze", "key_positions", g.constant([1, 2]))
        ends = g.op("Unsqueeze", "block_ends", g.constant([1, 3]))
        mask = g.op("And", mask, g.op("Less", keys_at, ends))
    layer_output(g, config, "hidden", g.op("Attention", q, keys, values, mask), "hidden_out")


def projections(g: Graph, config: ModelConfig, hidden: str) -> tuple[str, str, str]:
    """Q [B, H, A, D], K and V [B, G, A, D] of `hidden` [B, A, d]; Q and K are rotated."""
    normed = g.norm(hidden, "attn_norm", config.norm_eps)
    q, k, v = (
        g.swap(g.reshape(g.linear(normed, f"{name}_proj"), 0, 0, heads, config.head_size))
        for name, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads))
    )
    if config.qk_norm:
        q, k = (g.norm(x, f"{name}_norm", config.norm_eps) for name, x in (("q", q), ("k", k)))
    return rotate(g, config, q), rotate(g, config, k), v


def rotate(g: Graph, config: ModelConfig, x: str) -> str:
    """Rotary embedding (arXiv 2104.09864) of x [B, H, A, D] at `positions`, in float32."""
    tables = (g.table(f"rotary_{n}", t) for n, t in zip(("cos", "sin"), rotary_tables(config), strict=True))
    part: dict[str, Any] = {} if config.rotary_size is None else {"rotary_embedding_dim": config.rotary_size}
    rotated = g.op("RotaryEmbedding", g.cast(x, "fp32"), *tables, "positions", **part)
    return g.cast(rotated, g.dtype, "fp32")


def rotary_tables(config: ModelConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin [max_length, R/2] in float32, as `engines.eager.layers.rotary_tables` computes them."""
    exponents = np.arange(0, config.rotated, 2, dtype=np.float32) / np.float32(config.rotated)
    frequencies = np.float32(1) / np.power(np.float32(config.rope_theta), exponents)
    angles = np.outer(np.arange(config.max_length, dtype=np.float32), frequencies)
    return np.cos(angles), np.sin(angles)


def layer_output(g: Graph, config: ModelConfig, hidden: str, attended: str, name: str) -> str:
    """The output of a layer, called `name`, from its input [B, A, d] and the attended values [B, H, A, D]."""
    flat = g.reshape(g.swap(attended), 0, 0, config.heads * config.head_size)
    middle = g.op("Add", hidden, g.linear(flat, "attn_out"))
    normed = g.norm(middle, "ff_norm", config.norm_eps)
    if config.experts is not None and "router.weight" in g.weights:
        return g.op("Add", middle, experts.mixture(g, config.experts, normed, config.d_model), name=name)
    gated = experts.gated(g, g.linear(normed, "ff_proj"), g.linear(normed, "up_proj"))
    return g.op("Add", middle, g.linear(gated, "ff_out"), name=name)


def head(g: Graph, config: ModelConfig) -> None:
    """hidden [B, A, d] and rows [B, W] -> token and confidence [B, W], logits [B, W, V]."""
    predict(g, config, g.op("GatherND", "hidden", g.op("Unsqueeze", "rows", g.constant([2])), batch_dims=1))


def predict(g: Graph, config: ModelConfig, rows: str) -> None:
    """`logits`, `token` and `confidence` of rows [B, W, d] of the last layer's output.

    [MASK] is excluded from the arg-max; the softmax is over all columns but the
    suppressed ones.
    """
    logits = g.linear(g.norm(rows, "ln_f", config.norm_eps), "ff_out")
    if g.dtype == "fp32":
        g.op("Identity", logits, name="logits")
    else:
        g.op("Cast", logits, name="logits", to=TensorProto.FLOAT)
    possible = "logits"
    if config.suppressed:
        possible = g.op("Add", "logits", g.table("suppressed", exclusion(config, config.suppressed)))
    no_mask = g.table("no_mask", exclusion(config, (config.mask_id,)))
    g.op("ArgMax", g.op("Add", possible, no_mask), name="token", axis=-1, keepdims=0)
    odds = g.op("Add", g.op("Softmax", possible, axis=-1), no_mask)
    g.op("ReduceMax", odds, g.constant([-1]), name="confidence", keepdims=0)


def exclusion(config: ModelConfig, ids: tuple[int, ...]) -> NDArray[np.float32]:
    """[V] to add to logits so that `ids` are never the largest: -inf there, else 0."""
    found = np.zeros(config.vocab, np.float32)
    found[list(ids)] = -np.inf
    return found


def drift(g: Graph, config: ModelConfig) -> None:
    """sigma [B] of the drift test that the signature names, from queries and keys before and after a pass.

    The two kinds are described in `engines.eager.layers.drift`.
    """
    kind = g.signature.name.partition("_")[2]
    written = g.op("Shape", "k_prev", start=2, end=3)
    unchanged = g.op("Slice", scores(g, config, "q_prev", "k_cache"), written, g.constant([2**62]), g.constant([3]))
    before = g.op("Concat", scores(g, config, "q_prev", "k_prev"), unchanged, axis=3)
    old = attention_rows(g, before)
    new = attention_rows(g, scores(g, config, "q_now", "k_cache"))
    similar = similarity(g, kind, old, new)
    counted = g.op("Unsqueeze", "tracked_rows", g.constant([2 if kind == "head" else 1]))
    if kind == "head":
        counted = g.op("And", counted, g.op("Unsqueeze", "key_mask", g.constant([1])))
    weights = g.op("Expand", g.op("Cast", counted, to=TensorProto.FLOAT), g.op("Shape", similar))
    axes = g.constant([1, 2])
    total = g.op("ReduceSum", g.op("Mul", similar, weights), axes, keepdims=0)
    g.op("Div", total, g.op("ReduceSum", weights, axes, keepdims=0), name="sigma")


def scores(g: Graph, config: ModelConfig, q: str, k: str) -> str:
    """Scaled q·k in float32: q [B, T, H, D], k [B, G, S, D] -> [B, H, T, S]."""
    # Scaled after the product: numbers in half precision are exact in TF32, scaled ones are not.
    # Each reshape infers one axis, so T may be dynamic: [B, H, T, D] -> [B, G, H/G·T, D] and back.
    grouped = g.reshape(g.swap(g.cast(q, "fp32")), 0, config.kv_heads, -1, config.head_size)
    product = g.op("MatMul", grouped, g.op("Transpose", g.cast(k, "fp32"), perm=[0, 1, 3, 2]))
    product = g.op("Mul", product, g.constant(config.head_size**-0.5, np.float32))
    slots = g.op("Shape", product, start=3, end=4)
    shape = g.op("Concat", g.constant([0, config.heads, -1]), slots, axis=0)
    return g.op("Reshape", product, shape)


def attention_rows(g: Graph, raw: str) -> str:
    """Softmax of scores [B, H, T, S] over the keys that `key_mask` allows."""
    masked = g.op("Where", "key_mask", g.constant(0, np.float32), g.constant(-np.inf, np.float32))
    return g.op("Softmax", g.op("Add", raw, g.op("Unsqueeze", masked, g.constant([1, 2]))), axis=-1)


def similarity(g: Graph, kind: str, old: str, new: str) -> str:
    """Cosines of attention rows [B, H, T, S]: over the keys, [B, H, T]; for `head` over the heads, [B, T, S]."""
    axis = g.constant([1 if kind == "head" else -1])

    def norm(x: str) -> str:
        length = g.op("Sqrt", g.op("ReduceSum", g.op("Mul", x, x), axis, keepdims=0))  # ReduceL2 takes twice as long
        return g.op("Max", length, g.constant(1e-8, np.float32)) if kind == "head" else length

    dot = g.op("ReduceSum", g.op("Mul", old, new), axis, keepdims=0)
    return g.op("Div", dot, g.op("Mul", norm(old), norm(new)))


def probe(g: Graph, config: ModelConfig) -> None:
    """probe [B, K]: the slots with the most attention of the rows in `window_rows`, among those in `probe_keys`."""
    rows = attention_rows(g, scores(g, config, "q_window", "k_cache"))
    counted = g.op("Cast", g.op("Unsqueeze", "window_rows", g.constant([1, 2])), to=TensorProto.FLOAT)
    mass = g.op("ReduceSum", g.op("MatMul", counted, rows), g.constant([1, 2]), keepdims=0)
    most_attended(g, mass, g.constant([g.signature.outputs[0].axes[1]]))


def most_attended(g: Graph, mass: str, count: str) -> None:
    """probe [B, K]: the `count` [1] keys in `probe_keys` with the most of `mass` [B, S]."""
    g.top_k(g.op("Where", "probe_keys", mass, g.constant(-1.0, np.float32)), count, "probe")


WRITERS: dict[str, Writer] = {"embed": embed, "layer": layer, "head": head, "drift": drift, "probe": probe}
