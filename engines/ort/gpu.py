"""ONNX Runtime on an NVIDIA GPU, through its CUDA provider.

The exported graphs run in the bundle's precision, on the memory and the stream of
`engines.gpu.model`: every input and output is bound to its address, so nothing is
copied and caches are written in place.
"""

import io
import logging
from collections.abc import Hashable
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import onnxruntime as ort

from engines.bundle import Bundle
from engines.errors import INSTALL, DeviceError, OptionError
from engines.gpu.cuda import Cuda
from engines.gpu.executor import Bindings
from engines.gpu.model import GpuModel
from engines.ort.sessions import translated
from engines.signatures import GraphSignature
from engines.signatures.gpu import gpu_signatures

PROVIDERS = {"cuda": "CUDAExecutionProvider"}
OLDEST = 1, 27  # the first release whose provider has a kernel for every operator of the graphs
TYPES = {"fp32": np.float32, "fp16": np.float16, "int64": np.int64, "bool": np.bool_}
UNSYNCHRONISED = ort.RunOptions()  # runs follow each other on one stream; without this each would wait for it
UNSYNCHRONISED.add_run_config_entry("disable_synchronize_execution_providers", "1")
logger = logging.getLogger(__name__)
GRAIN = 256  # slots are rounded up to a multiple of this, so that sequences of similar length share memory


class Session:
    """One part's session, bound to device memory; only what changed is bound again."""

    def __init__(self, signature: GraphSignature, session: Any, bundle: Bundle):
        self.signature, self.session, self.bundle = signature, session, bundle
        self.binding = session.io_binding()
        self.bound: Bindings = {}

    def run(self, profile: int, bindings: Bindings, place: Hashable = None) -> None:
        """Queue the part on the addresses and shapes of `bindings`; one session serves every profile and place."""
        binding = self.binding
        for bind, tensors in (
            (binding.bind_input, self.signature.inputs),
            (binding.bind_output, self.signature.outputs),
        ):
            for tensor in tensors:
                address, shape = bindings[tensor.name]
                if self.bound.get(tensor.name) != (address, shape):
                    bind(tensor.name, "cuda", 0, TYPES[tensor.dtype], shape, address)
                    self.bound[tensor.name] = address, shape
        with translated(f"{self.signature.name} on the GPU", self.bundle):
            self.session.run_with_iobinding(binding, UNSYNCHRONISED)


class OnnxRuntimeGpuModel(GpuModel):
    """All parts of a bundle as sessions on one GPU and one stream."""

    backend = "onnxruntime"
    capturable = False  # its providers allocate memory while they run

    def __init__(self, bundle: Bundle, provider: str = "cuda", device: int = 0):
        super().__init__(bundle)
        self.provider = available(provider)
        if bundle.manifest.precision == "bf16":
            raise OptionError(
                "ONNX Runtime's providers for GPUs bind no bf16: build with --fp16, or use --backend tensorrt"
            )
        load_libraries()
        self.cuda = Cuda(device)
        signatures = gpu_signatures(self.config, bundle.manifest.precision, self.capacity.track_num)
        with self.cuda.closed_on_error():
            bundle.check(bundle.files_for(None))
            opened = {signature: self._open(signature.name, device) for signature in signatures}
            self.sessions = {signature.name: Session(signature, one, bundle) for signature, one in opened.items()}
        self.weights = {}  # they are in the sessions

    def _open(self, part: str, device: int) -> Any:
        settings = {"device_id": str(device), "user_compute_stream": str(self.cuda.stream)}
        # Memory as it is asked for, not in powers of two; products in float32 stay such.
        settings |= {"arena_extend_strategy": "kSameAsRequested", "use_tf32": "0"}
        options = ort.SessionOptions()
        # An operator without a kernel on the GPU would run on the CPU, with copies there and back in every layer.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            return ort.InferenceSession(
                str(self.bundle.graph(part)), options, providers=[(PROVIDERS[self.provider], settings)]
            )
        except Exception as error:
            reason = str(error).split("\n")[0]
            raise DeviceError(
                f"ONNX Runtime {ort.__version__} cannot run {part} with its {self.provider} provider: {reason}; "
                "update onnxruntime-gpu, or use --provider cpu"
            ) from error

    def engine(self, part: str, slots: int) -> Session:
        return self.sessions[part]

    def slots_for_length(self, length: int) -> int:
        return -(-(length + self.capacity.rows) // GRAIN) * GRAIN

    @property
    def device(self) -> str:
        return f"{self.cuda.name}, onnxruntime {ort.__version__} ({self.provider})"

    def close(self) -> None:
        self.sessions.clear()
        super().close()


def load_libraries() -> None:
    """Load the CUDA libraries that pip installed, where ONNX Runtime finds them; it prints what it does not find."""
    with redirect_stdout(io.StringIO()) as said:
        getattr(ort, "preload_dlls", lambda: None)()
    for line in said.getvalue().splitlines():
        logger.info("%s", line)


def available(provider: str) -> str:
    """`provider`, if this ONNX Runtime has it.

    Raises OptionError if it is unknown, DeviceError if it is missing or too old for the graphs.
    """
    if provider == "tensorrt":
        raise OptionError(
            "ONNX Runtime's TensorRT provider is not used, as it would compile every shape of a pass when it first "
            "comes; use --backend tensorrt, whose engines are built before"
        )
    if provider not in PROVIDERS:
        raise OptionError(f"unknown provider {provider!r}; choose from auto, cpu, {', '.join(PROVIDERS)}")
    if PROVIDERS[provider] not in ort.get_available_providers():
        raise DeviceError(
            f"this ONNX Runtime has no {provider} provider (it has {', '.join(ort.get_available_providers())}); "
            f"{INSTALL.format(extra='gpu')} brings onnxruntime-gpu"
        )
    if tuple(map(int, ort.__version__.split(".")[:2])) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise DeviceError(
            f"ONNX Runtime {ort.__version__} lacks kernels for a GPU that the graphs need and {wanted} has; "
            f"`pip install 'onnxruntime-gpu>={wanted}'`, or use --provider cpu"
        )
    return provider
