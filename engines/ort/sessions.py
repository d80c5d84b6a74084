"""The parts of a bundle as ONNX Runtime sessions on the CPU.

All sessions of a process share one thread pool, because a pool for each would
spin against the others (12 layers of width 1,024: 321 ms a pass with a pool
each, 71 ms with one), and one arena, so that each layer computes in memory that
the layer before has just used.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import onnxruntime as ort

from engines.bundle import Bundle
from engines.cores import default_threads
from engines.errors import BackendError, OptionError

ort.set_default_logger_severity(3)  # errors only
_threads: int | None = None  # of the process-wide pool, which ONNX Runtime creates once


def share_threads(threads: int | None = None) -> int:
    """Create the process-wide pool and arena on the first call; returns the pool's number of threads.

    None takes the pool as it is, or `default_threads` for a new one. Raises
    OptionError if the pool has another number of threads already.
    """
    global _threads
    if _threads is None:
        _threads = threads or default_threads()
        ort.set_global_thread_pool_sizes(_threads, 1)
        memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        ort.create_and_register_allocator(memory, None)
    if threads not in (None, _threads):
        raise OptionError(
            f"ONNX Runtime's pool already has {_threads} threads in this process, not {threads}; leave threads out, or "
            "start another process"
        )
    return _threads


class translated:
    """A context that turns an exception of ONNX Runtime into a BackendError that names `what` of `bundle`."""

    def __init__(self, what: str, bundle: Bundle):
        self.what, self.bundle = what, bundle

    def __enter__(self) -> None:
        pass

    def __exit__(self, error_type: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        # Runs on bound values raise plain RuntimeErrors, all else exceptions of ONNX Runtime's own.
        if error_type is not None and (error_type is RuntimeError or error_type.__module__.startswith("onnxruntime")):
            reason = str(error).split("\n")[0]
            raise BackendError(
                f"ONNX Runtime failed on {self.what}: {reason}; check it with `{self.bundle.verify}`"
            ) from error


class Sessions(dict[str, ort.InferenceSession]):
    """Part -> its session. `timed(part)` is the context in which each part runs (`Model.timed`)."""

    def __init__(
        self, bundle: Bundle, backend: str, parts: Iterable[str],
        timed: Callable[[str], AbstractContextManager[None]], threads: int | None = None,
    ):  # fmt: skip
        self.threads = share_threads(threads)
        self.timed, self.bundle = timed, bundle
        super().__init__((part, _open(bundle, backend, part)) for part in parts)

    def run(self, part: str, outputs: list[str] | None, **inputs: Any) -> list[Any]:
        """Run `part` on arrays; returns the named outputs (None: all) as arrays."""
        session = self._session(part)
        with self.timed(part), translated(part, self.bundle):
            return list(session.run(outputs, inputs))

    def run_bound(self, part: str, binding: Any) -> None:
        """Run `part` on the values of its `binding`."""
        session = self._session(part)
        with self.timed(part), translated(part, self.bundle):
            session.run_with_iobinding(binding)

    def check_open(self) -> None:
        """Raise BackendError if the model is closed: bindings outlive their sessions, and must not be used then."""
        if not self:
            raise BackendError("the model is closed; load it again")

    def _session(self, part: str) -> ort.InferenceSession:
        self.check_open()
        return self[part]


def _open(bundle: Bundle, backend: str, part: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    with translated(part, bundle):
        return ort.InferenceSession(str(bundle.graph(part, backend)), options, providers=["CPUExecutionProvider"])
