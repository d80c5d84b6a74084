"""The parts as the CPU runs them: attention is written out, so that its rows can be read.

There every slot is a key, so nothing is masked; MatMul and Softmax are as fast
as the fused operator, and the rows of tracked tokens and of the window, which
the layer has computed anyway, are what the drift test and the probe look at.
Drift test and probe run once for many layers.
"""

import numpy as np
from onnx import TensorProto, helper

from engines.config import ModelConfig
from export import fused
from export.graph import Graph


def layer(g: Graph, config: ModelConfig) -> None:
    q, k, v = fused.projections(g, config)
    keys, values = fused.cached(g, k, v)
    scaled = g.op("Mul", q, g.constant(config.head_size**-0.5, np.float32))
    grouped = regroup(g, scaled, config.heads, config.kv_heads, config.head_size)
    weights = g.op("Softmax", g.op("MatMul", grouped, g.op("Transpose", keys, perm=[0, 1, 3, 2])), axis=-1)
    attended = g.op("MatMul", weights, values)
    by_head = g.op("Reshape", weights, g.op("Concat", g.constant([0, config.heads, -1]), slots(g, keys), axis=0))
    g.op("Gather", by_head, "watched", name="attention", axis=2)
    fused.finish(g, config, regroup(g, attended, config.kv_heads, config.heads, config.head_size))


def regroup(g: Graph, x: str, before: int, after: int, size: int) -> str:
    """[B, before, N, D] as [B, after, N · before / after, D]: heads that share keys lie one after the other."""
    return x if before == after else g.reshape(x, 0, after, -1, size)


def slots(g: Graph, cache: str) -> str:
    return g.op("Shape", cache, start=2, end=3)


def recall(g: Graph, config: ModelConfig) -> None:
    g.op("Softmax", fused.scores(g, config, "q_prev", "k_cache"), name="before", axis=-1)


def drift(g: Graph, kind: str) -> None:
    tracked = g.op("Shape", "before", start=2, end=3)
    now = g.op("Slice", "attention", g.constant([0]), tracked, g.constant([2]))
    alike = fused.similarity(g, kind, "before", now)
    if kind == "min":
        token = g.op("ReduceMean", alike, g.constant([1]), keepdims=0)
        g.op("ReduceMin", token, g.constant([1]), name="sigma", keepdims=0)
    elif kind == "focus":
        keys = g.op("Cast", g.op("Shape", now, start=3, end=4), to=TensorProto.FLOAT)
        fused.weighted_mean(g, alike, fused.focus(g, now, keys))
    else:
        g.op("ReduceMean", alike, g.constant([1, 2]), name="sigma", keepdims=0)
    probe(g)


def probe(g: Graph) -> None:
    counted = g.op("Unsqueeze", g.op("Cast", "window_rows", to=TensorProto.FLOAT), g.constant([0]))
    mass = g.op("ReduceSum", g.op("MatMul", counted, "attention"), g.constant([1, 2]), keepdims=0)
    eligible = g.op("Where", "probe_keys", mass, g.constant(-1.0, np.float32))
    g.nodes.append(helper.make_node("TopK", [eligible, "track_num"], ["probe_mass", "probe"], name="topk", axis=-1))
