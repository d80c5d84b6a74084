"""ONNX Runtime on the CPU: the embedded default.

One session per part. All sessions share one thread pool, for a pool each would
spin against the others, and one arena, so that each layer computes in memory
that the one before has just used. Nothing here knows windows, gamma or text.
"""

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.errors import BackendError, DeviceError, OptionError
from engines.model import Model
from engines.ort.workspace import Workspace
from engines.runner import SequenceRunner
from engines.signatures.cpu import cpu_signatures

ort.set_default_logger_severity(3)
_threads: int | None = None  # of the process-wide pool: ONNX Runtime creates it once


def share_threads(threads: int | None) -> int:
    """Size the process-wide pool and share one arena, once; raises OptionError if the pool has another size already."""
    global _threads
    if _threads is None:
        _threads = threads or len(os.sched_getaffinity(0))
        ort.set_global_thread_pool_sizes(_threads, 1)
        place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        ort.create_and_register_allocator(place, None)
    if threads not in (None, _threads):
        raise OptionError(f"ONNX Runtime's pool already has {_threads} threads in this process, not {threads}")
    return _threads


class translated:
    """Turns ONNX Runtime's exceptions into BackendError, naming the part."""

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # Runs on bound values raise plain RuntimeErrors, all else exceptions of ONNX Runtime's own.
        if kind is not None and (kind is RuntimeError or kind.__module__.startswith("onnxruntime")):
            reason = str(error).split("\n")[0]
            raise BackendError(
                f"ONNX Runtime failed on {self.what}: {reason}; check it with `python -m export verify`"
            ) from error


def open_model(bundle: Bundle, threads: int | None = None, provider: str = "auto") -> Model:
    """The bundle on ONNX Runtime: on the GPU where it has a provider and finds one, else on the CPU.

    `provider` (cpu, cuda, tensorrt) asks for one of them. The model's `note`
    says why `auto` passed the GPU over, where there is a provider for it.
    """
    if provider == "cpu":
        return OnnxRuntimeModel(bundle, threads)
    from engines.ort.gpu import PROVIDERS, OnnxRuntimeGpuModel

    if provider != "auto":
        return OnnxRuntimeGpuModel(bundle, provider)
    if threads is None and PROVIDERS["cuda"] in ort.get_available_providers():
        try:
            return OnnxRuntimeGpuModel(bundle)
        except DeviceError as error:
            model = OnnxRuntimeModel(bundle)
            model.note = f"the GPU is passed over: {error}"
            return model
    return OnnxRuntimeModel(bundle, threads)


class OnnxRuntimeModel(Model):
    """All parts of a bundle as sessions; drift tests and probe are shared by all layers."""

    backend = "onnxruntime"

    def __init__(self, bundle: Bundle, threads: int | None = None):
        super().__init__(bundle)
        self.threads = share_threads(threads)
        together = "reuse" in bundle.engines(self.backend)["parts"]
        self.sessions = {
            signature.name: self._open(signature.name) for signature in cpu_signatures(self.config, together)
        }
        self.workspaces: list[Workspace] = []

    def workspace(self, place: int) -> Workspace:
        """The memory of the sequence at a place, which takes over that of the one before."""
        while place >= len(self.workspaces):
            self.workspaces.append(Workspace(self))
        return self.workspaces[place]

    def _open(self, part: str) -> ort.InferenceSession:
        path = self.bundle.graph(part, self.backend)
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        with translated(part):
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    @property
    def device(self) -> str:
        return f"CPU, {self.threads} threads, onnxruntime {ort.__version__}"

    def new_runner(self, length: int, limit: int | None = None) -> SequenceRunner:
        return self.new_runners([(length, limit or length)])[0]

    def new_runners(self, spans: list[tuple[int, int]]) -> Sequence[SequenceRunner]:
        from engines.ort.runner import OnnxRuntimeRunner

        return [OnnxRuntimeRunner(self, length, limit, place) for place, (length, limit) in enumerate(spans)]

    def run(self, part: str, outputs: list[str], **feeds: Any) -> list[Any]:
        began = time.perf_counter()
        with translated(part):
            found = list(self._session(part).run(outputs, feeds))
        self.seconds[part] += time.perf_counter() - began
        self.runs[part] += 1
        return found

    def run_bound(self, part: str, binding: Any) -> None:
        """Run a part on what `binding` binds."""
        began = time.perf_counter()
        with translated(part):
            self._session(part).run_with_iobinding(binding)
        self.seconds[part] += time.perf_counter() - began
        self.runs[part] += 1

    def _session(self, part: str) -> ort.InferenceSession:
        if self.closed:
            raise BackendError("the model is closed; load it again")
        return self.sessions[part]

    def forward(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        found = []
        for row in ids:
            runner = self.new_runner(len(row))
            runner.embed(row)
            runner.run_layers(len(row), None)
            found.append(runner.logits(np.arange(len(row))))
        return np.stack(found)

    def close(self) -> None:
        super().close()
        self.sessions.clear()
        self.workspaces.clear()
