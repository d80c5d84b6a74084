"""Feed-forward networks, and mixtures of them, in graphs.

A reuse pass on a GPU touches nearly all experts of a model with 64, so all are
computed there, as one batched product whose results are weighted with 0 where a
row does not take an expert: no weight is read twice, and none is gathered. A CPU
would compute for nothing, so there the rows are sorted by their experts, and each
network runs on its own rows, which may be none.
"""

import numpy as np
from onnx import TensorProto

from engines.config import ExpertsConfig
from export.graphs.builder import Graph

NAMES = "ff_proj", "up_proj", "ff_out"


def network(g: Graph, x: str, gate: str, up: str, out: str) -> str:
    """SwiGLU: (silu(x @ gate) * (x @ up)) @ out."""
    return g.op("MatMul", gated(g, g.op("MatMul", x, gate), g.op("MatMul", x, up)), out)


def gated(g: Graph, gate: str, up: str) -> str:
    """silu(gate) * up."""
    return g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)


def mixture(g: Graph, config: ExpertsConfig, x: str, width: int) -> str:
    """The mixture of experts on x [B, A, d], with d = `width`, as `engines.eager.layers.experts` has it."""
    rows = g.reshape(x, -1, width)
    odds, chosen = route(g, config, rows)
    mixed = (touched if g.signature.dialect == "cpu" else everyone)(g, config, rows, odds, chosen, width)
    if config.shared:
        mixed = g.op("Add", mixed, network(g, rows, *(g.weight(f"shared.{name}.weight") for name in NAMES)))
    return g.op("Reshape", mixed, g.op("Shape", x))


def route(g: Graph, config: ExpertsConfig, rows: str) -> tuple[str, str]:
    """The scores [N, k] of the experts of rows [N, d], in the graph's type, and their indices [N, k]."""
    if not config.sigmoid:
        odds = g.op("Softmax", g.cast(g.op("MatMul", rows, g.weight("router.weight")), "fp32"), axis=-1)
        values, indices = g.ops("TopK", odds, g.constant([config.per_row]), outputs=2, axis=-1)
        return g.cast(values, g.dtype, "fp32"), indices
    product = g.op("MatMul", g.cast(rows, "fp32"), g.cast(g.weight("router.weight"), "fp32"))
    scores = g.op("Sigmoid", product)
    ranks = g.op("Add", scores, g.cast(g.weight("router.bias"), "fp32"))
    if config.kept_groups < config.groups:
        ranks = among_groups(g, config, ranks)
    _, indices = g.ops("TopK", ranks, g.constant([config.per_row]), outputs=2, axis=-1)
    odds = g.op("GatherElements", scores, indices, axis=1)
    total = g.op("Add", g.op("ReduceSum", odds, g.constant([1])), g.constant(1e-20, np.float32))
    scaled = g.op("Mul", g.op("Div", odds, total), g.constant(config.scale, np.float32))
    return g.cast(scaled, g.dtype, "fp32"), indices


def among_groups(g: Graph, config: ExpertsConfig, ranks: str) -> str:
    """The ranks [N, E], -inf outside the kept groups: those whose two best ranks have the largest sums."""
    grouped = g.reshape(ranks, 0, config.groups, -1)
    best, _ = g.ops("TopK", grouped, g.constant([2]), outputs=2, axis=-1)
    sums = g.op("ReduceSum", best, g.constant([2]), keepdims=0)  # [N, groups]
    _, kept = g.ops("TopK", sums, g.constant([config.kept_groups]), outputs=2, axis=-1)
    same = g.op("Equal", g.op("Unsqueeze", kept, g.constant([1])), g.constant(np.arange(config.groups)[:, None]))
    found = g.op("ReduceSum", g.op("Cast", same, to=TensorProto.FLOAT), g.constant([2]))  # [N, groups, 1]
    is_kept = g.op("Cast", found, to=TensorProto.BOOL)
    return g.reshape(g.op("Where", is_kept, grouped, g.constant(-np.inf, np.float32)), 0, -1)


def everyone(g: Graph, config: ExpertsConfig, rows: str, odds: str, chosen: str, width: int) -> str:
    """All experts on all rows: [N, d]. The last product adds up the weighted results of a row."""
    gate, up, out = (g.weight(f"experts.{name}.weight") for name in NAMES)
    column = g.op("Slice", odds, g.constant([0]), g.constant([1]), g.constant([1]))  # its shape [N, 1] is what counts
    zeros = g.constant(np.zeros((1, config.count)), np.float32)
    nothing = g.cast(g.op("Expand", zeros, g.op("Shape", column)), g.dtype, "fp32")
    weights = g.op("ScatterElements", nothing, chosen, odds, axis=1)  # [N, E]
    inner = gated(g, g.op("MatMul", rows, gate), g.op("MatMul", rows, up))  # [E, N, I]
    weighted = g.op("Mul", g.op("Transpose", inner, perm=[1, 0, 2]), g.op("Unsqueeze", weights, g.constant([2])))
    return g.op("MatMul", g.reshape(weighted, 0, -1), g.reshape(out, -1, width))


def touched(g: Graph, config: ExpertsConfig, rows: str, odds: str, chosen: str, width: int) -> str:
    """Each expert on the rows that take it: [N, d]. Rows are sorted by expert, and split where the next one begins."""
    flat = g.reshape(chosen, -1)
    ones = g.op("Equal", g.op("Unsqueeze", flat, g.constant([1])), g.constant(range(config.count)))
    sizes = g.op("ReduceSum", g.op("Cast", ones, to=TensorProto.INT64), g.constant([0]), keepdims=0)  # [E]
    _, order = g.ops("TopK", flat, g.op("Shape", flat), outputs=2, axis=0, largest=0)  # equal ones keep their order
    source = g.op("Div", order, g.constant(config.per_row))  # [N·k]: the row of each
    parts = g.ops("Split", g.op("Gather", rows, source), sizes, outputs=config.count, axis=0)
    results = [
        network(g, part, *(g.weight(f"experts.{name}.weight", index) for name in NAMES))
        for index, part in enumerate(parts)
    ]
    weights = g.op("Unsqueeze", g.op("Gather", g.reshape(odds, -1), order), g.constant([1]))
    nothing = g.op("Sub", rows, rows)
    places = g.op("Unsqueeze", source, g.constant([1]))
    weighted = g.op("Mul", g.op("Concat", *results, axis=0), weights)
    return g.op("ScatterND", nothing, places, weighted, reduction="add")
