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
    # [B, 1, A, S]: ONNX Runtime does not broadcast a mask along the rows. It would compute on a shape on the CPU, which
    # sessions on a GPU refuse, so the shape is that of a tensor.
    shape = g.op("Shape", g.op("Unsqueeze", "positions", g.constant([1, 3])))
    mask = g.op("Expand", g.op("Unsqueeze", "key_bias", g.constant([1, 2])), shape)
    if config.block_length:
        keys_at = g.op("Unsqueeze", "key_positions", g.constant([1, 2]))
        ends = g.op("Unsqueeze", "block_ends", g.constant([1, 3]))
        hidden_keys = g.cast(g.constant(-np.inf, np.float32), g.dtype, "fp32")
        mask = g.op("Where", g.op("Less", keys_at, ends), mask, hidden_keys)
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


def tests(g: Graph, config: ModelConfig) -> None:
    """sigma [B] of the drift test that the signature names, and probe [B, K], of one layer after a reuse pass.

    The two kinds are described in `engines.eager.layers.drift`. The queries before
    and after the pass are scored in one product, so the keys are read once.
    """
    kind = g.signature.name.partition("_")[2]
    written = g.op("Shape", "k_prev", start=2, end=3)
    both = g.op("Concat", "q_prev", "q_now", axis=1)
    of_prev, of_now = g.ops("Split", scores(g, config, both, "k_cache"), outputs=2, axis=4, num_outputs=2)
    unchanged = g.op("Slice", of_prev, written, g.constant([2**62]), g.constant([2]))
    before = g.op("Concat", scores(g, config, "q_prev", "k_prev"), unchanged, axis=2)
    old, new = attention_rows(g, before), attention_rows(g, of_now)
    similar = similarity(g, kind, old, new, keys=2, heads=(1, 3))  # [B, G, H/G, T]; for head: [B, S, T]
    counted = g.op("Unsqueeze", "tracked_rows", g.constant([1] if kind == "head" else [1, 2]))
    if kind == "head":
        exists = g.op("Equal", g.cast("key_bias", "fp32"), g.constant(0, np.float32))
        counted = g.op("And", counted, g.op("Unsqueeze", exists, g.constant([2])))
    weights = g.op("Expand", g.op("Cast", counted, to=TensorProto.FLOAT), g.op("Shape", similar))
    axes = g.constant([1, 2] if kind == "head" else [1, 2, 3])
    total = g.op("ReduceSum", g.op("Mul", similar, weights), axes, keepdims=0)
    g.op("Div", total, g.op("ReduceSum", weights, axes, keepdims=0), name="sigma")
    probed(g, new, "window_rows")


def probe(g: Graph, config: ModelConfig) -> None:
    """probe [B, K]: the slots with the most attention of the rows in `window_rows`, among those in `probe_keys`."""
    probed(g, attention_rows(g, scores(g, config, "q_window", "k_cache")), "window_rows")


def probed(g: Graph, rows: str, counted: str) -> None:
    """probe [B, K] from attention [B, G, S, H/G, T]; the rows in `counted` [B, T] are added up."""
    weights = g.op("Cast", g.op("Unsqueeze", counted, g.constant([1, 2, 3])), to=TensorProto.FLOAT)
    mass = g.op("ReduceSum", g.op("Mul", rows, weights), g.constant([1, 3, 4]), keepdims=0)
    most_attended(g, mass, g.constant([g.signature.outputs[-1].axes[1]]))


def most_attended(g: Graph, mass: str, count: str) -> None:
    """probe [B, K]: the `count` [1] keys in `probe_keys` with the most of `mass` [B, S]."""
    g.top_k(g.op("Where", "probe_keys", mass, g.constant(-1.0, np.float32)), count, "probe")


def scores(g: Graph, config: ModelConfig, q: str, k: str) -> str:
    """Scaled k·q in float32: q [B, T, H, D], k [B, G, S, D] -> [B, G, S, H/G, T].

    K times Q transposed, since of Q times K transposed a compiler writes all of K
    out anew. Scaled after the product, whose inputs are then exact in TF32.
    """
    group = config.heads // config.kv_heads
    # [B, T, H, D] -> [B, D, H, T] -> [B, D, G, H/G·T] -> [B, G, D, H/G·T]; each reshape infers one axis.
    by_head = g.op("Transpose", q, perm=[0, 3, 2, 1])
    grouped = g.op("Transpose", g.reshape(by_head, 0, 0, config.kv_heads, -1), perm=[0, 2, 1, 3])
    product = g.cast(g.op("MatMul", k, grouped), "fp32")
    scaled = g.op("Mul", product, g.constant(config.head_size**-0.5, np.float32))
    return g.reshape(scaled, 0, 0, 0, group, -1)


def attention_rows(g: Graph, raw: str) -> str:
    """Softmax of scores [B, G, S, H/G, T] over the keys that `key_bias` lets count."""
    bias = g.op("Unsqueeze", g.cast("key_bias", "fp32"), g.constant([1, 3, 4]))
    return g.op("Softmax", g.op("Add", raw, bias), axis=2)


def similarity(g: Graph, kind: str, old: str, new: str, keys: int = -1, heads: tuple[int, ...] = (1,)) -> str:
    """Cosines of attention rows along the axis `keys`; for `head` across the axes `heads`, for each key."""
    axis = g.constant(list(heads) if kind == "head" else [keys])

    def norm(x: str) -> str:
        length = g.op("Sqrt", g.op("ReduceSum", g.op("Mul", x, x), axis, keepdims=0))  # ReduceL2 takes twice as long
        return g.op("Max", length, g.constant(1e-8, np.float32)) if kind == "head" else length

    dot = g.op("ReduceSum", g.op("Mul", old, new), axis, keepdims=0)
    return g.op("Div", dot, g.op("Mul", norm(old), norm(new)))


WRITERS: dict[str, Writer] = {"embed": embed, "layer": layer, "head": head, "tests": tests, "probe": probe}
