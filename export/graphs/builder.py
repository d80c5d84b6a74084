"""Collecting one ONNX graph: standard operators, weights as external data.

Opset 24 has the operators TensorRT maps to its native layers (RMSNormalization,
RotaryEmbedding, TensorScatter, Attention), and ONNX Runtime's CPU provider runs
them too. Nothing here knows what the parts compute.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.signatures import GraphSignature, TensorSpec
from engines.weights import Entry

OPSET = 24
Files = Mapping[str, tuple[Mapping[str, Entry], str]]  # part -> the tensors of its weight file, and that file's name
ELEMENTS = {
    "fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64, "bool": TensorProto.BOOL,
}  # fmt: skip


class Graph:
    """Collects nodes and initializers; every method returns the name of the value it made."""

    def __init__(self, signature: GraphSignature, dtype: str, files: Files):
        self.signature, self.dtype, self.files = signature, dtype, files
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.prefix = ""
        self.weights, self.location = files.get(signature.name, ({}, ""))

    def enter(self, part: str) -> None:
        """Take weights from the file of `part` from now on: a graph may hold more than one part."""
        self.prefix = f"{part}."
        self.weights, self.location = self.files[part]

    def op(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        name = name or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def split(self, x: str, *sizes: int, axis: int) -> list[str]:
        stem = f"split_{len(self.nodes)}"
        names = [f"{stem}.{i}" for i in range(len(sizes))]
        self.nodes.append(helper.make_node("Split", [x, self.constant(sizes)], names, name=stem, axis=axis))
        return names

    def constant(self, values: Any, dtype: Any = np.int64) -> str:
        array = np.asarray(values, dtype=dtype)
        name = f"const_{array.dtype}_{'x'.join(map(str, array.shape))}_{'_'.join(map(str, array.ravel()[:8]))}"
        self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def table(self, name: str, array: np.ndarray) -> str:
        self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str) -> str:
        """A tensor of a part's weight file, by reference."""
        entry, name = self.weights[name], self.prefix + name
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
            self.nodes, self.signature.name, list(map(value_info, self.signature.inputs)),
            list(map(value_info, self.signature.outputs)), list(self.initializers.values()),
        )  # fmt: skip
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=11, producer_name="elastic"
        )


def value_info(port: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(port.name, ELEMENTS[port.dtype], list(port.axes))
