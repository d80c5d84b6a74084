"""Which function writes which part."""

from collections.abc import Callable

import onnx

from engines.config import ModelConfig
from engines.spec import PartSpec
from export import fused, unfused, vision
from export.graph import Files, Graph


def build(spec: PartSpec, config: ModelConfig, dtype: str, files: Files) -> onnx.ModelProto:
    """The graph of one part in the form of its spec; the weight files lie beside the graph."""
    graph = Graph(spec, dtype, files)
    kind, _, detail = spec.name.partition("_")
    writers: dict[str, dict[str, Callable[[], object]]] = {
        "fused": {
            "embed": lambda: fused.embed(graph),
            "layer": lambda: fused.layer(graph, config),
            "head": lambda: fused.head(graph, config),
            "drift": lambda: fused.drift(graph, config, detail),
            "probe": lambda: fused.probe(graph, config, int(spec.outputs[0].axes[1])),
            "tower": lambda: vision.tower(graph, config),
            "projector": lambda: vision.projector(graph),
        },
        "unfused": {
            "layer": lambda: unfused.layer(graph, config, last=int(detail) == config.layers - 1),
            "reuse": lambda: unfused.reuse(graph, config),
            "recall": lambda: unfused.recall(graph, config),
            "drift": lambda: unfused.drift(graph, detail),
            "probe": lambda: unfused.probe(graph),
        },
    }
    writers[spec.form][kind]()
    return graph.model()
