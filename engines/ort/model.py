"""ONNX Runtime: the default back end, which runs anywhere. On the CPU one session runs each part."""

import logging
from collections.abc import Sequence

import onnxruntime as ort

from engines.bundle import Bundle
from engines.errors import DeviceError
from engines.model import Model
from engines.ort.gpu import PROVIDERS, OnnxRuntimeGpuModel
from engines.ort.runner import OnnxRuntimeRunner
from engines.ort.sessions import Sessions
from engines.ort.workspace import Workspace
from engines.runner import SequenceRunner
from engines.signatures.cpu import cpu_signatures

logger = logging.getLogger(__name__)


def open_model(bundle: Bundle, threads: int | None = None, provider: str = "auto") -> Model:
    """Load `bundle` on an NVIDIA GPU if this ONNX Runtime has a CUDA provider and finds one, else on the CPU.

    `provider` is "cpu", "cuda" or "auto", and `threads` the number of
    CPU threads, with which "auto" is the CPU. Where "auto" takes the CPU although
    there is a CUDA provider, a warning says why. Raises DeviceError where the
    provider's device is missing.
    """
    if provider not in ("auto", "cpu"):
        return OnnxRuntimeGpuModel(bundle, provider)
    if provider == "auto" and PROVIDERS["cuda"] in ort.get_available_providers():
        if threads is not None:
            logger.warning("not using the GPU: threads are an option of the CPU")
        else:
            try:
                return OnnxRuntimeGpuModel(bundle)
            except DeviceError as error:
                logger.warning("not using the GPU: %s", error)
    return OnnxRuntimeModel(bundle, threads)


class OnnxRuntimeModel(Model):
    """All parts of a bundle as sessions on the CPU; one drift test and one probe serve all layers."""

    backend = "onnxruntime"

    def __init__(self, bundle: Bundle, threads: int | None = None):
        super().__init__(bundle)
        bundle.check(bundle.files_for(self.backend))
        together = "reuse" in bundle.engines(self.backend)["parts"]
        parts = [signature.name for signature in cpu_signatures(self.config, together)]
        self.sessions = Sessions(bundle, self.backend, parts, self.timed, threads)
        self.workspaces: list[Workspace] = []  # of each sequence of a batch, used by one batch after the other

    @property
    def threads(self) -> int:
        """CPU threads of the process-wide pool."""
        return self.sessions.threads

    @property
    def device(self) -> str:
        return f"CPU, {self.threads} threads, onnxruntime {ort.__version__}"

    def new_runners(self, spans: list[tuple[int, int]]) -> Sequence[SequenceRunner]:
        while len(self.workspaces) < len(spans):
            self.workspaces.append(Workspace(self.sessions))
        return [
            OnnxRuntimeRunner(self.config, self.capacity, workspace, length, limit)
            for workspace, (length, limit) in zip(self.workspaces, spans, strict=False)
        ]

    def close(self) -> None:
        super().close()
        self.sessions.clear()
        self.workspaces.clear()
