"""The two sides of a comparison as Polygraphy's runners: an exported graph, and the same part in eager PyTorch."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER
from safetensors.torch import load_file
from torch import Tensor

from engines.bundle import Bundle
from engines.eager import layers as eager
from engines.eager import vision_layers as eager_vision
from engines.ort.sessions import share_threads
from engines.signatures import GraphSignature

Arrays = dict[str, NDArray[Any]]  # by name of the input or output
DTYPES = {"fp32": np.float32, "fp16": np.float16, "int64": np.int64, "bool": np.bool_}
ERRORS = 3  # ONNX Runtime's level of messages: it would warn of every cache that is not written in place


def run_both(bundle: Bundle, signature: GraphSignature, feeds: Arrays) -> tuple[Arrays, Arrays]:
    """The outputs of the exported graph and of the reference on the inputs `feeds`, which Polygraphy checks."""
    runners = graph_runner(bundle, signature.name), ReferenceRunner(bundle, signature)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run(runners, data_loader=[feeds])
    outputs, expected = (dict(results[runner.name][0].items()) for runner in runners)
    return outputs, expected


def graph_runner(bundle: Bundle, part: str) -> OnnxrtRunner:
    """The exported graph of `part` in ONNX Runtime on the CPU, loaded when it is activated."""

    def session() -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS
        options.use_per_session_threads = False
        share_threads()
        return onnxruntime.InferenceSession(str(bundle.graph(part)), options, providers=["CPUExecutionProvider"])

    return OnnxrtRunner(session, name="graph")


class ReferenceRunner(BaseRunner):  # type: ignore[misc]
    """A part in eager PyTorch, in float32 on the CPU, with the inputs and outputs of its exported graph."""

    def __init__(self, bundle: Bundle, signature: GraphSignature):
        super().__init__(name="reference")
        self.bundle, self.signature = bundle, signature
        self.weights: eager.Weights = {}

    def activate_impl(self) -> None:
        if self.bundle.manifest.parts[self.signature.name]["weights"]:
            stored = load_file(self.bundle.weights(self.signature.name))
            self.weights = {name: tensor.float() for name, tensor in stored.items()}

    def deactivate_impl(self) -> None:
        self.weights = {}

    def get_input_metadata_impl(self) -> Any:
        metadata = TensorMetadata()
        for spec in self.signature.inputs:
            metadata.add(spec.name, DTYPES[spec.dtype], [axis if isinstance(axis, int) else -1 for axis in spec.axes])
        return metadata

    @torch.inference_mode()
    def infer_impl(self, feed_dict: dict[str, Any]) -> dict[str, Any]:
        began = time.perf_counter()
        inputs = {name: torch.from_numpy(array.copy()) for name, array in feed_dict.items()}
        inputs = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
        kind = self.signature.name.partition("_")[0]
        outputs = REFERENCES[kind](self.bundle, self.signature, self.weights, **inputs)
        self.inference_time = time.perf_counter() - began
        return {name: tensor.numpy() for name, tensor in outputs.items()}


Outputs = dict[str, Tensor]  # by name


def embed(bundle: Bundle, signature: GraphSignature, weights: eager.Weights, ids: Tensor) -> Outputs:
    return {"hidden": eager.embed(weights, ids)}


def layer(
    bundle: Bundle, signature: GraphSignature, weights: eager.Weights, write_index: Tensor, k_cache: Tensor,
    v_cache: Tensor, key_bias: Tensor, **inputs: Tensor,
) -> Outputs:  # fmt: skip
    config = bundle.config
    tables = eager.rotary_tables(config.max_length, config.rotated, config.rope_theta)
    start = int(write_index[0])  # the same for all sequences
    hidden, q = eager.layer(
        config, weights, tables, write_index=start, k_cache=k_cache, v_cache=v_cache, key_mask=key_bias == 0, **inputs
    )
    return {"hidden_out": hidden, "q": q, "k_cache_out": k_cache, "v_cache_out": v_cache}


def head(bundle: Bundle, signature: GraphSignature, weights: eager.Weights, hidden: Tensor, rows: Tensor) -> Outputs:
    chosen = torch.gather(hidden, 1, rows[:, :, None].expand(-1, -1, hidden.shape[2]))
    token, confidence, logits = eager.head(bundle.config, weights, chosen)
    outputs = {"confidence": confidence, "logits": logits}
    if bundle.manifest.precision == "fp32":  # half precision may decide between two nearly equal logits otherwise
        outputs["token"] = token
    return outputs


def tests(
    bundle: Bundle, signature: GraphSignature, weights: eager.Weights, window_rows: Tensor, probe_keys: Tensor,
    key_bias: Tensor, **inputs: Tensor,
) -> Outputs:  # fmt: skip
    mask = key_bias == 0
    sigma = eager.drift(signature.name.partition("_")[2], key_mask=mask, **inputs)
    q, keys = inputs["q_now"], inputs["k_cache"]
    return {"sigma": sigma, "probe": eager.probe(bundle.capacity.track_num, q, window_rows, keys, mask, probe_keys)}


def probe(
    bundle: Bundle, signature: GraphSignature, weights: eager.Weights, key_bias: Tensor, **inputs: Tensor
) -> Outputs:
    return {"probe": eager.probe(bundle.capacity.track_num, key_mask=key_bias == 0, **inputs)}


def tower(bundle: Bundle, signature: GraphSignature, weights: eager.Weights, pixels: Tensor) -> Outputs:
    assert bundle.config.vision is not None, "a model without vision has no tower"
    return {"features": eager_vision.tower(bundle.config.vision, weights, pixels)}


def projector(bundle: Bundle, signature: GraphSignature, weights: eager.Weights, features: Tensor) -> Outputs:
    return {"projected": eager_vision.projector(weights, features)}


REFERENCES: dict[str, Callable[..., Outputs]] = {
    "embed": embed, "layer": layer, "head": head, "tests": tests, "probe": probe,
    "tower": tower, "projector": projector,
}  # fmt: skip
