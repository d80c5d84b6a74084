"""Graphs mirror signatures: names, inputs, outputs; and what the builder stores once, or by reference."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from engines.bundle import Bundle
from engines.config import ModelConfig
from engines.signatures import GraphSignature, TensorSpec
from engines.signatures.cpu import cpu_signatures
from engines.signatures.gpu import gpu_signatures
from engines.weights import Entry, locate
from export import graphs
from export.graphs.builder import ELEMENTS, Graph

ONE = GraphSignature("one", (TensorSpec("x", "fp32", ("A",)),), (TensorSpec("y", "fp32", ("A",)),))


@pytest.fixture(scope="module")
def files(golden_bundle: Path) -> dict[str, tuple[dict[str, Entry], str]]:
    """The weight files of the golden bundle."""
    bundle = Bundle.open(golden_bundle)
    paths = {name: golden_bundle / f"onnx/{name}.safetensors" for name in bundle.config.parts}
    return {name: (locate(path), path.name) for name, path in paths.items()}


def signatures(config: ModelConfig) -> Iterator[GraphSignature]:
    yield from gpu_signatures(config, "fp32", 4)
    yield from cpu_signatures(config, True)


def test_every_signature_has_its_graph(
    golden_bundle: Path, files: dict[str, tuple[dict[str, Entry], str]], tmp_path: Path
) -> None:
    """Names, element types and axes of inputs and outputs are the signature's, and ONNX accepts the graph."""
    config = Bundle.open(golden_bundle).config
    for name in config.parts:
        shutil.copy(golden_bundle / f"onnx/{name}.safetensors", tmp_path)
    for signature in signatures(config):
        model = graphs.build(signature, config, "fp32", files)
        assert list(map(described, model.graph.input)) == [
            (s.name, ELEMENTS[s.dtype], s.axes) for s in signature.inputs
        ]
        assert list(map(described, model.graph.output)) == [
            (s.name, ELEMENTS[s.dtype], s.axes) for s in signature.outputs
        ]
        onnx.save(model, str(tmp_path / "graph.onnx"))
        onnx.checker.check_model(str(tmp_path / "graph.onnx"), full_check=True)


def described(value: onnx.ValueInfoProto) -> tuple[str, int, tuple[str | int, ...]]:
    """Name, element type and axes of a graph's input or output."""
    tensor = value.type.tensor_type
    return value.name, tensor.elem_type, tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)


def test_functions_are_named_as_their_signatures(golden_bundle: Path) -> None:
    config = Bundle.open(golden_bundle).config
    kinds = {(s.dialect, s.name.partition("_")[0]) for s in signatures(config)}
    written = {(dialect, kind) for dialect, functions in graphs.WRITERS.items() for kind in functions}
    assert kinds == written - {("gpu", "tower"), ("gpu", "projector")}
    assert all(
        function.__name__ == kind for functions in graphs.WRITERS.values() for kind, function in functions.items()
    )


def test_an_unknown_part_has_no_graph(golden_bundle: Path) -> None:
    with pytest.raises(KeyError, match="tail"):
        graphs.build(replace(ONE, name="tail"), Bundle.open(golden_bundle).config, "fp32", {})


def test_equal_constants_are_stored_once() -> None:
    g = Graph(ONE, "fp32", {})
    assert g.constant([1, 2]) == g.constant((1, 2)) != g.constant([1, 2], np.float32)
    long = list(range(12))
    assert g.constant(long) != g.constant([*long[:-1], 99]), "two long constants that begin alike"
    assert len(g.initializers) == 4


def test_weights_stay_in_their_files() -> None:
    """A graph refers to a tensor by file, offset and length; in a graph of several parts names have the part's."""
    entry = Entry("fp16", (2, 3), 64, 12)
    g = Graph(ONE, "fp32", {"one": ({"w": entry}, "one.safetensors"), "two": ({"w": entry}, "two.safetensors")})
    assert g.weight("w") == "w"
    g.use_weights_of("two")
    assert g.weight("w") == "two.w"
    tensor = g.initializers["two.w"]
    assert tensor.data_type == onnx.TensorProto.FLOAT16 and list(tensor.dims) == [2, 3] and not tensor.raw_data
    assert {e.key: e.value for e in tensor.external_data} == {
        "location": "two.safetensors", "offset": "64", "length": "12",
    }  # fmt: skip


def test_scores_are_scaled_after_their_product(
    golden_bundle: Path, files: dict[str, tuple[dict[str, Entry], str]]
) -> None:
    """What is multiplied are numbers as they were stored: in half precision TF32 takes these exactly."""
    config = Bundle.open(golden_bundle).config
    for signature in gpu_signatures(config, "fp16", 4):
        if signature.name.partition("_")[0] not in ("tests", "probe"):
            continue
        nodes = {node.output[0]: node for node in graphs.build(signature, config, "fp16", files).graph.node}
        products = [node for node in nodes.values() if node.op_type == "MatMul"]
        assert products
        for product in products:
            waiting, before = list(product.input), set()
            while waiting:
                node = nodes.get(waiting.pop())
                if node is not None:
                    before.add(node.op_type)
                    waiting += node.input
            assert before <= {"Transpose", "Reshape", "Concat"}, before
