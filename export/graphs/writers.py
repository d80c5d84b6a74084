"""Which function writes which part."""

from collections.abc import Callable

import onnx

from engines.config import ModelConfig
from engines.signatures import GraphSignature
from export.graphs import cpu, gpu, vision
from export.graphs.builder import Files, Graph


def build(signature: GraphSignature, config: ModelConfig, dtype: str, files: Files) -> onnx.ModelProto:
    """The graph of one part in the form of its spec; the weight files lie beside the graph."""
    graph = Graph(signature, dtype, files)
    kind, _, detail = signature.name.partition("_")
    writers: dict[str, dict[str, Callable[[], object]]] = {
        "gpu": {
            "embed": lambda: gpu.embed(graph),
            "layer": lambda: gpu.layer(graph, config),
            "head": lambda: gpu.head(graph, config),
            "drift": lambda: gpu.drift(graph, config, detail),
            "probe": lambda: gpu.probe(graph, config, int(signature.outputs[0].axes[1])),
            "tower": lambda: vision.tower(graph, config),
            "projector": lambda: vision.projector(graph),
        },
        "cpu": {
            "layer": lambda: cpu.layer(graph, config, last=int(detail) == config.layers - 1),
            "reuse": lambda: cpu.reuse(graph, config),
            "attention": lambda: cpu.attention(graph, config),
            "drift": lambda: cpu.drift(graph, detail),
            "probe": lambda: cpu.probe(graph),
        },
    }
    writers[signature.dialect][kind]()
    return graph.model()
