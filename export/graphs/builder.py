"""Builds one ONNX graph: standard operators, with weights as external data.

Some operators that TensorRT maps to native layers are new (`SINCE`); the CPU
provider of ONNX Runtime runs them too. A graph has the lowest opset that its
operators need: providers of ONNX Runtime for GPUs lack kernels of the newest one for
operators that it did not change in any way that matters here.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import ArrayLike, DTypeLike, NDArray
from onnx import TensorProto, helper, numpy_helper

from engines.config import ModelConfig
from engines.signatures import GraphSignature, TensorSpec
from engines.weights import Entry

OPSET = 18  # of graphs without newer operators
SINCE = {"Gelu": 20, "RMSNormalization": 23, "RotaryEmbedding": 23, "Attention": 23, "TensorScatter": 24}
WeightFiles: TypeAlias = Mapping[str, tuple[Mapping[str, Entry], str]]  # part -> (its tensors, its weight file's name)
ELEMENTS = {
    "fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64, "bool": TensorProto.BOOL,
}  # fmt: skip


class Graph:
    """Nodes and initializers of one graph; each method that adds some returns the name of the new value.

    `weights` are the tensors of the current part's weight file, and `dtype` is
    the element type of its hidden states.
    """

    def __init__(self, signature: GraphSignature, dtype: str, files: WeightFiles):
        self.signature, self.dtype, self.files = signature, dtype, files
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.prefix = ""
        self.weights, self.location = files.get(signature.name, ({}, ""))

    def use_weights_of(self, part: str) -> None:
        """Take weights from the file of `part` from here on, in a graph of several parts."""
        self.prefix = f"{part}."
        self.weights, self.location = self.files[part]

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add an operator with one output, called `name`."""
        name = name or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def ops(self, kind: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """Add an operator with several outputs."""
        stem = f"{kind.lower()}_{len(self.nodes)}"
        names = [f"{stem}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=stem, **attributes))
        return names

    def split(self, x: str, *sizes: int, axis: int) -> list[str]:
        """Split `x` along `axis` into values of these sizes."""
        return self.ops("Split", x, self.constant(sizes), outputs=len(sizes), axis=axis)

    def top_k(self, x: str, count: str, name: str) -> str:
        """Indices of the `count` [1] largest values along the last axis of `x`, in descending order."""
        self.nodes.append(helper.make_node("TopK", [x, count], [f"{name}_values", name], name=f"{name}_topk", axis=-1))
        return name

    def constant(self, values: ArrayLike, dtype: DTypeLike = np.int64) -> str:
        """A small constant; equal constants are stored once."""
        array = np.asarray(values, dtype=dtype)
        return self.table(
            f"const_{array.dtype}_{'x'.join(map(str, array.shape))}_{'_'.join(map(str, array.flat))}", array
        )

    def table(self, name: str, array: NDArray[Any]) -> str:
        """A constant stored in the graph under `name`."""
        self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str, index: int | None = None) -> str:
        """A tensor of the current part's weight file, by reference; of a stack, the one at `index`."""
        entry, name = self.weights[name], self.prefix + name
        shape, offset, length = entry.shape, entry.offset, entry.length
        if index is not None:
            shape, length = shape[1:], length // shape[0]
            name, offset = f"{name}.{index}", offset + index * length
        tensor = TensorProto(name=name, data_type=ELEMENTS[entry.dtype], dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers[name] = tensor
        return name

    def linear(self, x: str, name: str) -> str:
        """x [..., in] times `name`.weight [in, out], plus `name`.bias [out] where the part has one."""
        product = self.op("MatMul", x, self.weight(f"{name}.weight"))
        return self.op("Add", product, self.weight(f"{name}.bias")) if f"{name}.bias" in self.weights else product

    def norm(self, x: str, name: str, eps: float) -> str:
        """RMS norm over the last axis, computed in float32 (arXiv 1910.07467)."""
        return self.op("RMSNormalization", x, self.weight(f"{name}.weight"), axis=-1, epsilon=eps, stash_type=1)

    def cast(self, x: str, dtype: str, source: str | None = None) -> str:
        """Cast `x` from `source` (by default the graph's dtype) to `dtype`."""
        return x if dtype == (source or self.dtype) else self.op("Cast", x, to=ELEMENTS[dtype])

    def reshape(self, x: str, *shape: int) -> str:
        """Reshape as ONNX does: 0 keeps an axis, -1 is inferred."""
        return self.op("Reshape", x, self.constant(shape))

    def swap(self, x: str) -> str:
        """Swap the middle axes of four: [B, A, H, D] <-> [B, H, A, D]."""
        return self.op("Transpose", x, perm=[0, 2, 1, 3])

    def model(self) -> onnx.ModelProto:
        """The model with the inputs and outputs of the signature."""
        graph = helper.make_graph(
            self.nodes, self.signature.name, list(map(value_info, self.signature.inputs)),
            list(map(value_info, self.signature.outputs)), list(self.initializers.values()),
        )  # fmt: skip
        opset = max([OPSET, *(SINCE.get(node.op_type, OPSET) for node in self.nodes)])
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11, producer_name="elastic"
        )


Writer: TypeAlias = Callable[[Graph, ModelConfig], object]  # adds the operators of one part to a graph


def value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    """An input or output of a graph."""
    return helper.make_tensor_value_info(spec.name, ELEMENTS[spec.dtype], list(spec.axes))
