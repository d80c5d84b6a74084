"""Which nodes of a graph ONNX Runtime's CUDA provider takes, from the table of its kernels in tests/data."""

import json
from collections.abc import Iterator
from typing import Any

import onnx
from onnx import TensorProto

from tests.support.cases import DATA

TABLE: dict[str, Any] = json.loads((DATA / "cuda_kernels.json").read_text())
RELEASES: dict[str, str] = TABLE["mended"]["releases"]  # "operator version" -> the first release with a kernel
NAMES = {"FLOAT": "float", "DOUBLE": "double"} | {
    kind: kind.lower()
    for kind in (
        "BOOL",
        "FLOAT16",
        "BFLOAT16",
        "INT8",
        "INT16",
        "INT32",
        "INT64",
        "UINT8",
        "UINT16",
        "UINT32",
        "UINT64",
    )
}
HOST = {
    ("Reshape", 1),
    ("Expand", 1),
    ("Slice", 1),
    ("Slice", 2),
}  # operators that read an input, by its number, in the memory of the host


def number(release: str) -> tuple[int, ...]:
    """ "1.27.0" -> (1, 27, 0)."""
    return tuple(map(int, release.split(".")))


def without_kernel(model: onnx.ModelProto, release: str | None = None) -> set[str]:
    """Operators, with their versions, of nodes that no kernel serves: in the table, or also in what was mended up to
    `release`."""
    missing = {operator for operator, types in operators(model) if not has_kernel(operator, types)}
    return {operator for operator in missing if release is None or not mended(operator, release)}


def mended(operator: str, release: str) -> bool:
    return operator in RELEASES and number(RELEASES[operator]) <= number(release)


def operators(model: onnx.ModelProto) -> Iterator[tuple[str, dict[str, str]]]:
    """Of each node the operator with its version, and the types of its type constraints."""
    (opset,) = (entry.version for entry in model.opset_import)
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        schema = onnx.defs.get_schema(node.op_type, opset)
        bound = {
            formals[min(index, len(formals) - 1)].type_str: NAMES[TensorProto.DataType.Name(types[name])]
            for formals, actuals in ((schema.inputs, node.input), (schema.outputs, node.output))
            for index, name in enumerate(actuals)
            if name
        }
        yield f"{node.op_type} {schema.since_version}", bound


def has_kernel(operator: str, types: dict[str, str]) -> bool:
    """Whether the table has a kernel for this version of an operator and these types."""
    name, version = operator.split()
    for first, last, constraints in TABLE["kernels"].get(name, ()):
        # A kernel that is registered without an end serves its own version alone.
        serves = int(version) == first if last is None else first <= int(version) <= last
        if serves and all(kind in accepted(constraints[what]) for what, kind in types.items() if what in constraints):
            return True
    return False


def accepted(types: str | list[str]) -> list[str]:
    """The types of a group, or those that are listed."""
    found: list[str] = TABLE["groups"][types] if isinstance(types, str) else types
    return found


def on_the_host(model: onnx.ModelProto) -> list[str]:
    """Nodes that compute with shapes, which the provider leaves to the CPU: those that read one but as an argument."""
    shapes = {node.output[0] for node in model.graph.node if node.op_type == "Shape"}
    return [
        node.name
        for node in model.graph.node
        for index, name in enumerate(node.input)
        if name in shapes and (node.op_type, index) not in HOST
    ]
