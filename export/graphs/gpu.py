"""The parts as exported: attention is one operator, under a mask.

Each function writes one part of `engines.signatures.gpu` and says the same as its
namesake in `engines.eager.layers`. Nothing here knows a checkpoint's names
or a back end.
"""

import numpy as np
from onnx import TensorProto, helper

from engines.config import ModelConfig
from export.graphs.builder import ELEMENTS, Graph


def embed(g: Graph) -> str:
    """The rows of `ids`, called `hidden`."""
    if g.weights["wte.weight"].dtype == g.dtype:
        return g.op("Gather", g.weight("wte.weight"), "ids", name="hidden")
    # A half-precision table stays as it is; only the rows looked up are cast.
    rows = g.op("Gather", g.weight("wte.weight"), "ids")
    return g.op("Cast", rows, name="hidden", to=ELEMENTS[g.dtype])


def layer(g: Graph, config: ModelConfig) -> None:
    q, k, v = projections(g, config, "hidden")
    g.op("Transpose", q, name="q", perm=[0, 2, 1, 3])
    keys = g.op("TensorScatter", "k_cache", k, "write_index", name="k_cache_out", axis=2, mode="linear")
    values = g.op("TensorScatter", "v_cache", v, "write_index", name="v_cache_out", axis=2, mode="linear")
    one = g.constant([1])
    rows = g.op("Shape", "hidden", start=1, end=2)
    shape = g.op("Concat", one, one, rows, one, axis=0)
    mask = g.op("Expand", g.op("Unsqueeze", "key_mask", g.constant([1, 2])), shape)
    finish(g, config, "hidden", g.op("Attention", q, keys, values, mask), "hidden_out")


def projections(g: Graph, config: ModelConfig, hidden: str) -> tuple[str, str, str]:
    """Q, K, V [B, heads, A, D] of `hidden`, the first two rotated."""
    normed = g.norm(hidden, "attn_norm", config.norm_eps)
    q, k, v = (
        g.swap(g.reshape(g.linear(normed, f"{name}_proj"), 0, 0, heads, config.head_size))
        for name, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads))
    )

    if config.qk_norm:
        q, k = (g.norm(x, f"{name}_norm", config.norm_eps) for name, x in (("q", q), ("k", k)))
    return rotate(g, config, q), rotate(g, config, k), v


def rotate(g: Graph, config: ModelConfig, x: str) -> str:
    """The rotary of x [B, heads, A, D] at `positions`, in float32."""
    tables = (g.table(f"rotary_{n}", t) for n, t in zip(("cos", "sin"), rotary_tables(config), strict=True))
    turned = g.op("RotaryEmbedding", g.cast(x, "fp32"), *tables, "positions")
    return g.cast(turned, g.dtype, "fp32")


def finish(g: Graph, config: ModelConfig, hidden: str, attended: str, name: str) -> str:
    """From the attended values [B, H, A, D] of the rows `hidden` to what leaves the layer, called `name`."""
    flat = g.reshape(g.swap(attended), 0, 0, config.heads * config.head_size)
    middle = g.op("Add", hidden, g.linear(flat, "attn_out"))
    normed = g.norm(middle, "ff_norm", config.norm_eps)
    gate = g.linear(normed, "ff_proj")
    gated = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), g.linear(normed, "up_proj"))
    return g.op("Add", middle, g.linear(gated, "ff_out"), name=name)


def rotary_tables(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [max_length, D/2] in float32, as `reference.rotary_tables` has them."""
    exponents = np.arange(0, config.head_size, 2, dtype=np.float32) / np.float32(config.head_size)
    frequencies = np.float32(1) / np.power(np.float32(config.rope_theta), exponents)
    angles = np.outer(np.arange(config.max_length, dtype=np.float32), frequencies)
    return np.cos(angles), np.sin(angles)


def head(g: Graph, config: ModelConfig) -> None:
    predict(g, config, g.op("GatherND", "hidden", g.op("Unsqueeze", "rows", g.constant([2])), batch_dims=1))


def predict(g: Graph, config: ModelConfig, rows: str) -> None:
    """Logits, token and confidence of the rows [B, W, d] that leave the last layer."""
    logits = g.linear(g.norm(rows, "ln_f", config.norm_eps), "ff_out")
    logits = g.op("Identity" if g.dtype == "fp32" else "Cast", logits, name="logits",
                  **({} if g.dtype == "fp32" else {"to": TensorProto.FLOAT}))  # fmt: skip
    counted = logits
    if config.suppressed:
        counted = g.op("Add", logits, g.table("suppressed", barred(config, config.suppressed)))
    barring = g.table("barred", barred(config, (config.mask_id,)))
    allowed = g.op("Add", counted, barring)
    g.op("ArgMax", allowed, name="token", axis=-1, keepdims=0)
    odds = g.op("Add", g.op("Softmax", counted, axis=-1), barring)
    g.op("ReduceMax", odds, g.constant([-1]), name="confidence", keepdims=0)


def barred(config: ModelConfig, ids: tuple[int, ...]) -> np.ndarray:
    """What is added to logits [V] so that `ids` are never the best."""
    found = np.zeros(config.vocab, np.float32)
    found[list(ids)] = -np.inf
    return found


def scores(g: Graph, config: ModelConfig, q: str, k: str) -> str:
    """Scaled q·k in float32: q [B, N, H, D], k [B, G, S, D] -> [B, H, N, S]."""
    scale = g.constant(config.head_size**-0.5, np.float32)
    grouped = g.op("Mul", g.cast(q, "fp32"), scale)
    # Both reshapes leave one axis open, so N may be dynamic: [B, G, H/G·N, D] and back.
    grouped = g.reshape(g.swap(grouped), 0, config.kv_heads, -1, config.head_size)
    product = g.op("MatMul", grouped, g.op("Transpose", g.cast(k, "fp32"), perm=[0, 1, 3, 2]))
    slots = g.op("Shape", product, start=3, end=4)
    shape = g.op("Concat", g.constant([0, config.heads, -1]), slots, axis=0)
    return g.op("Reshape", product, shape)


def attention_rows(g: Graph, config: ModelConfig, raw: str) -> str:
    """Softmax over the keys that `key_mask` allows. raw [B, H, N, S]."""
    barred = g.op("Where", "key_mask", g.constant(0, np.float32), g.constant(-np.inf, np.float32))
    return g.op("Softmax", g.op("Add", raw, g.op("Unsqueeze", barred, g.constant([1, 2]))), axis=-1)


def drift(g: Graph, config: ModelConfig, kind: str) -> None:
    written = g.op("Shape", "k_prev", start=2, end=3)
    kept = g.op("Slice", scores(g, config, "q_prev", "k_cache"), written, g.constant([2**62]), g.constant([3]))
    before = g.op("Concat", scores(g, config, "q_prev", "k_prev"), kept, axis=3)
    old = attention_rows(g, config, before)
    new = attention_rows(g, config, scores(g, config, "q_now", "k_cache"))
    alike = similarity(g, kind, old, new)
    counted = g.op("Unsqueeze", "tracked_rows", g.constant([2 if kind == "head" else 1]))
    if kind == "head":
        counted = g.op("And", counted, g.op("Unsqueeze", "key_mask", g.constant([1])))
    weights = g.op("Expand", g.op("Cast", counted, to=TensorProto.FLOAT), g.op("Shape", alike))
    axes = g.constant([1, 2])
    total = g.op("ReduceSum", g.op("Mul", alike, weights), axes, keepdims=0)
    g.op("Div", total, g.op("ReduceSum", weights, axes, keepdims=0), name="sigma")


def similarity(g: Graph, kind: str, old: str, new: str) -> str:
    """Cosines of attention rows [B, H, T, S]: over the keys, [B, H, T]; for `head` over the heads, [B, T, S]."""
    axis = g.constant([1 if kind == "head" else -1])

    def norm(x: str) -> str:
        length = g.op("Sqrt", g.op("ReduceSum", g.op("Mul", x, x), axis, keepdims=0))  # ReduceL2 takes twice as long
        return g.op("Max", length, g.constant(1e-8, np.float32)) if kind == "head" else length

    dot = g.op("ReduceSum", g.op("Mul", old, new), axis, keepdims=0)
    return g.op("Div", dot, g.op("Mul", norm(old), norm(new)))


def probe(g: Graph, config: ModelConfig, track_num: int) -> None:
    rows = attention_rows(g, config, scores(g, config, "q_window", "k_cache"))
    counted = g.op("Cast", g.op("Unsqueeze", "window_rows", g.constant([1, 2])), to=TensorProto.FLOAT)
    mass = g.op("ReduceSum", g.op("MatMul", counted, rows), g.constant([1, 2]), keepdims=0)
    eligible = g.op("Where", "probe_keys", mass, g.constant(-1.0, np.float32))
    g.nodes.append(
        helper.make_node("TopK", [eligible, g.constant([track_num])], ["probe_mass", "probe"], name="topk", axis=-1)
    )
