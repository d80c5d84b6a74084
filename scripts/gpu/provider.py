"""What ONNX Runtime's CUDA provider does with the parts of a bundle: where nodes run, and are passes captured."""

from collections import Counter
from typing import Any

import onnxruntime as ort

from engines.bundle import Bundle
from engines.ort.gpu import OnnxRuntimeGpuModel
from engines.signatures.gpu import gpu_signatures
from scripts.gpu import steps


def placement(bundle: Bundle) -> dict[str, dict[str, int]]:
    """The operators of each kind of part that do not run on the GPU, with their number.

    Sessions are made as the product does, but with ONNX Runtime's fallback to the CPU.
    """
    found: dict[str, dict[str, int]] = {}
    for signature in gpu_signatures(bundle.config, bundle.manifest.precision, bundle.capacity.track_num):
        kind = signature.name if signature.name.startswith("tests") else signature.name.partition("_")[0]
        if kind in found:
            continue
        options = ort.SessionOptions()
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        session = ort.InferenceSession(
            str(bundle.graph(signature.name)), options, providers=["CUDAExecutionProvider", "CPUExecutionProvider"]
        )
        parts = session.get_provider_graph_assignment_info()
        found[kind] = dict(
            Counter(
                node.op_type for part in parts if part.ep_name != "CUDAExecutionProvider" for node in part.get_nodes()
            )
        ) | {"on the GPU": sum(len(part.get_nodes()) for part in parts if part.ep_name == "CUDAExecutionProvider")}
    return found


class CapturedModel(OnnxRuntimeGpuModel):
    """The provider's passes with CUDA graphs, which the product does not use: its sessions may allocate memory."""

    capturable = True


def captured_steps(bundle: Bundle, length: int, window: int) -> dict[str, Any]:
    """The steps where passes are captured, if they can be."""
    model = CapturedModel(bundle)
    try:
        found: dict[str, Any] = {"ms": steps.steps(model, length, window, model.cuda.sync)}
        return found | steps.gpu_figures(model, length, window)
    finally:
        model.close()


def same_tokens(bundle: str) -> dict[str, Any]:
    """Tokens of prompts with captured passes, as the product runs them, and by eager PyTorch."""
    import engines.ort.model
    import runtime

    tokens: dict[str, Any] = {}
    kinds = {
        "eager": ("eager", None),
        "as it is": ("onnxruntime", OnnxRuntimeGpuModel),
        "captured": ("onnxruntime", CapturedModel),
    }
    kept = OnnxRuntimeGpuModel
    for name, (backend, opener) in kinds.items():
        engines.ort.model.OnnxRuntimeGpuModel = opener or kept  # type: ignore
        try:
            with runtime.load(bundle, backend) as model:
                prompts = [list(range(6, 6 + count)) for count in (5, 40, 17)]
                tokens[name] = [model.generate(p, gen_length=64, gamma=g).sequence for p in prompts for g in (0.0, 0.9)]
        finally:
            engines.ort.model.OnnxRuntimeGpuModel = kept  # type: ignore
    return {
        f"{a} = {b}": [bool(x == y) for x, y in zip(tokens[a], tokens[b], strict=True)]
        for a, b in (("eager", "as it is"), ("as it is", "captured"))
    }
