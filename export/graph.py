"""The parts as ONNX graphs: standard operators, weights as external data.

Each function writes one part of `engines.spec` and says the same as its
namesake in `engines.models.reference`. Opset 24 has the operators TensorRT maps
to its native layers (RMSNormalization, RotaryEmbedding, TensorScatter,
Attention), and ONNX Runtime's CPU provider runs them too. Nothing here knows a
checkpoint's names or a back end.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.spec import ModelConfig, PartSpec, Port
from engines.weights import Entry

OPSET = 24
ELEMENTS = {
    "fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64, "bool": TensorProto.BOOL,
}  # fmt: skip


class Graph:
    """Collects nodes and initializers; every method returns the name of the value it made."""

    def __init__(self, spec: PartSpec, dtype: str, weights: Mapping[str, Entry], location: str):
        self.spec, self.dtype, self.weights, self.location = spec, dtype, weights, location
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}

    def op(self, kind: str, *inputs: str, name: str = "", outputs: int = 1, **attributes: Any) -> str:
        stem = name or f"{kind.lower()}_{len(self.nodes)}"
        names = [stem] if outputs == 1 else [f"{stem}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=stem, **attributes))
        return names[0]

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        array = np.asarray(values, dtype=dtype)
        name = f"const_{array.dtype}_{'x'.join(map(str, array.shape))}_{'_'.join(map(str, array.ravel()[:8]))}"
        self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def table(self, name: str, array: np.ndarray) -> str:
        self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str) -> str:
        """A tensor of the part's weight file, by reference."""
        entry = self.weights[name]
        tensor = TensorProto(name=name, data_type=ELEMENTS[entry.dtype], dims=entry.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.location), ("offset", entry.offset), ("length", entry.length)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers[name] = tensor
        return name

    def linear(self, x: str, name: str) -> str:
        product = self.op("MatMul", x, self.weight(f"{name}.weight"))
        return self.op("Add", product, self.weight(f"{name}.bias")) if f"{name}.bias" in self.weights else product

    def norm(self, x: str, name: str, eps: float) -> str:
        return self.op("RMSNormalization", x, self.weight(f"{name}.weight"), axis=-1, epsilon=eps, stash_type=1)

    def cast(self, x: str, dtype: str, source: str | None = None) -> str:
        same = dtype == (source or self.dtype)
        return x if same else self.op("Cast", x, to=ELEMENTS[dtype])

    def reshape(self, x: str, *shape: int) -> str:
        return self.op("Reshape", x, self.constant(shape))

    def swap(self, x: str) -> str:
        """[B, X, Y, D] -> [B, Y, X, D]."""
        return self.op("Transpose", x, perm=[0, 2, 1, 3])

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, self.spec.name, list(map(value_info, self.spec.inputs)),
            list(map(value_info, self.spec.outputs)), list(self.initializers.values()),
        )  # fmt: skip
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=11, producer_name="elastic"
        )


def value_info(port: Port) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(port.name, ELEMENTS[port.dtype], list(port.axes))


def embed(g: Graph, config: ModelConfig) -> None:
    stored = g.weights["wte.weight"].dtype
    if stored == g.dtype:
        g.op("Gather", g.weight("wte.weight"), "ids", name="hidden")
    else:  # a half-precision table stays as it is; only the rows looked up are cast
        rows = g.op("Gather", g.weight("wte.weight"), "ids")
        g.op("Cast", rows, name="hidden", to=ELEMENTS[g.dtype])


def layer(g: Graph, config: ModelConfig) -> None:
    cos, sin = (
        g.table(f"rotary_{name}", table) for name, table in zip(("cos", "sin"), rotary_tables(config), strict=True)
    )
    normed = g.norm("hidden", "attn_norm", config.norm_eps)
    q, k, v = (
        g.swap(g.reshape(g.linear(normed, f"{name}_proj"), 0, 0, heads, config.head_size))
        for name, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads))
    )

    def rotate(x: str) -> str:
        turned = g.op("RotaryEmbedding", g.cast(x, "fp32"), cos, sin, "positions")
        return g.cast(turned, g.dtype, "fp32")

    q, k = rotate(q), rotate(k)
    g.op("Transpose", q, name="q", perm=[0, 2, 1, 3])
    keys = g.op("TensorScatter", "k_cache", k, "write_index", name="k_cache_out", axis=2, mode="linear")
    values = g.op("TensorScatter", "v_cache", v, "write_index", name="v_cache_out", axis=2, mode="linear")
    one = g.constant([1])
    rows = g.op("Shape", "hidden", start=1, end=2)
    shape = g.op("Concat", one, one, rows, one, axis=0)
    mask = g.op("Expand", g.op("Unsqueeze", "key_mask", g.constant([1, 2])), shape)
    attended = g.op("Attention", q, keys, values, mask)
    flat = g.reshape(g.swap(attended), 0, 0, config.heads * config.head_size)
    middle = g.op("Add", "hidden", g.linear(flat, "attn_out"))
    normed = g.norm(middle, "ff_norm", config.norm_eps)
    gate = g.linear(normed, "ff_proj")
    gated = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), g.linear(normed, "up_proj"))
    g.op("Add", middle, g.linear(gated, "ff_out"), name="hidden_out")


def rotary_tables(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [max_length, D/2] in float32, as `reference.rotary_tables` has them."""
    exponents = np.arange(0, config.head_size, 2, dtype=np.float32) / np.float32(config.head_size)
    frequencies = np.float32(1) / np.power(np.float32(config.rope_theta), exponents)
    angles = np.outer(np.arange(config.max_length, dtype=np.float32), frequencies)
    return np.cos(angles), np.sin(angles)


def head(g: Graph, config: ModelConfig) -> None:
    rows = g.op("GatherND", "hidden", g.op("Unsqueeze", "rows", g.constant([2])), batch_dims=1)
    logits = g.linear(g.norm(rows, "ln_f", config.norm_eps), "ff_out")
    logits = g.op("Identity" if g.dtype == "fp32" else "Cast", logits, name="logits",
                  **({} if g.dtype == "fp32" else {"to": TensorProto.FLOAT}))  # fmt: skip
    barred = np.zeros(config.vocab, np.float32)
    barred[config.mask_id] = -np.inf
    allowed = g.op("Add", logits, g.table("barred", barred))
    g.op("ArgMax", allowed, name="token", axis=-1, keepdims=0)
    last = g.constant([-1])
    top = g.op("ReduceMax", logits, last, keepdims=1)
    total = g.op("ReduceSum", g.op("Exp", g.op("Sub", logits, top)), last, keepdims=0)
    best = g.op("Sub", g.op("ReduceMax", allowed, last, keepdims=1), top)
    g.op("Div", g.op("Exp", g.op("Squeeze", best, last)), total, name="confidence")


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
    axis = g.constant([-1 if kind == "row" else 1])

    def norm(x: str) -> str:
        length = g.op("Sqrt", g.op("ReduceSum", g.op("Mul", x, x), axis, keepdims=0))  # ReduceL2 takes twice as long
        return length if kind == "row" else g.op("Max", length, g.constant(1e-8, np.float32))

    dot = g.op("ReduceSum", g.op("Mul", old, new), axis, keepdims=0)
    similarity = g.op("Div", dot, g.op("Mul", norm(old), norm(new)))  # row: [B, H, T]; head: [B, T, S]
    counted = g.op("Unsqueeze", "tracked_rows", g.constant([1 if kind == "row" else 2]))
    if kind == "head":
        counted = g.op("And", counted, g.op("Unsqueeze", "key_mask", g.constant([1])))
    weights = g.op("Expand", g.op("Cast", counted, to=TensorProto.FLOAT), g.op("Shape", similarity))
    axes = g.constant([1, 2])
    total = g.op("ReduceSum", g.op("Mul", similarity, weights), axes, keepdims=0)
    g.op("Div", total, g.op("ReduceSum", weights, axes, keepdims=0), name="sigma")


def probe(g: Graph, config: ModelConfig, track_num: int) -> None:
    rows = attention_rows(g, config, scores(g, config, "q_window", "k_cache"))
    counted = g.op("Cast", g.op("Unsqueeze", "window_rows", g.constant([1, 2])), to=TensorProto.FLOAT)
    mass = g.op("ReduceSum", g.op("MatMul", counted, rows), g.constant([1, 2]), keepdims=0)
    eligible = g.op("Where", "probe_keys", mass, g.constant(-1.0, np.float32))
    g.nodes.append(
        helper.make_node("TopK", [eligible, g.constant([track_num])], ["probe_mass", "probe"], name="topk", axis=-1)
    )


def build(
    spec: PartSpec, config: ModelConfig, dtype: str, weights: Mapping[str, Entry], location: str
) -> onnx.ModelProto:
    """The graph of one part. `weights` lie in the file `location`, beside the graph."""
    graph = Graph(spec, dtype, weights, location)
    kind, _, detail = spec.name.partition("_")
    writers: dict[str, Callable[[], None]] = {
        "embed": lambda: embed(graph, config),
        "layer": lambda: layer(graph, config),
        "head": lambda: head(graph, config),
        "drift": lambda: drift(graph, config, detail),
        "probe": lambda: probe(graph, config, int(spec.outputs[0].axes[1])),
    }
    writers[kind]()
    return graph.model()
