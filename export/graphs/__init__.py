"""ONNX graphs of the parts: one function for each signature of `engines.signatures`, under the same name."""

import onnx

from engines.config import ModelConfig
from engines.signatures import GraphSignature
from export.graphs import cpu, gpu, vision
from export.graphs.builder import Graph, WeightFiles

WRITERS = {"gpu": gpu.WRITERS | vision.WRITERS, "cpu": cpu.WRITERS}  # dialect -> kind of part -> function


def build(signature: GraphSignature, config: ModelConfig, dtype: str, files: WeightFiles) -> onnx.ModelProto:
    """Build the graph of `signature`; it computes in `dtype` (fp32, fp16, bf16).

    The graph refers to the tensors of the weight `files`, which must lie in the
    same folder as the graph.
    """
    graph = Graph(signature, dtype, files)
    kind = signature.name.partition("_")[0]
    WRITERS[signature.dialect][kind](graph, config)
    return graph.model()


def weights_to_inputs(model: onnx.ModelProto) -> None:
    """Make inputs of the graph's external weights."""
    graph = model.graph
    for tensor in [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]:
        graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        graph.initializer.remove(tensor)
