"""ONNX Runtime on the CPU: the embedded default.

One session per part. The caches are NumPy arrays, bound once per sequence as a
layer's input and output, so TensorScatter writes them in place; hidden states
go straight from one layer's rows of H to the next. Every slot is a position, so
nothing is masked. Layers leave the attention rows of tracked tokens and of the
window behind, and one run of the drift test looks at those of all layers. All
sessions share one thread pool: a pool for each would spin against the others.
Nothing here knows windows, gamma or text.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.errors import BackendError, DeviceError, OptionError
from engines.session import Model, Reuse, Slots, Walk, Watch
from engines.spec import layer_name, unfused_specs

ort.set_default_logger_severity(3)
NONE: Slots = np.zeros(0, np.int64)
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


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn ONNX Runtime's exceptions into BackendError, naming the part."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        reason = str(error).split("\n")[0]
        raise BackendError(
            f"ONNX Runtime failed on {what}: {reason}; check it with `python -m export verify`"
        ) from error


def open_model(bundle: Bundle, threads: int | None = None, provider: str = "auto") -> Model:
    """The bundle on ONNX Runtime: on the GPU where it has a provider and finds one, else on the CPU.

    `provider` (cpu, cuda, tensorrt) asks for one of them. The model's `note`
    says why `auto` passed the GPU over, where there is a provider for it.
    """
    if provider == "cpu":
        return OnnxRuntimeModel(bundle, threads)
    from engines.onnxruntime_gpu import PROVIDERS, OnnxRuntimeGpuModel

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
        self.sessions = {spec.name: self._open(spec.name) for spec in unfused_specs(self.config)}
        self.layers = [self.sessions[layer_name(i)] for i in range(self.config.layers)]

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

    def walk(self, length: int) -> "OnnxRuntimeWalk":
        return OnnxRuntimeWalk(self, length)

    def run(self, part: str, outputs: list[str], **feeds: Any) -> list[Any]:
        with translated(part):
            return list(self.sessions[part].run(outputs, feeds))

    def forward(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        config, (batch, length) = self.config, ids.shape
        (hidden,) = self.run("embed", ["hidden"], ids=ids)
        empty = np.zeros((batch, config.kv_heads, length, config.head_size), np.float32)
        fixed = {
            "positions": np.tile(np.arange(length), (batch, 1)),
            "write_index": np.zeros(batch, np.int64),
            "watched": NONE,
        }
        for index in range(config.layers):
            name = layer_name(index)
            (hidden,) = self.run(name, ["hidden_out"], hidden=hidden, k_cache=empty, v_cache=empty, **fixed)
        (logits,) = self.run("head", ["logits"], hidden=hidden, rows=fixed["positions"])
        return np.asarray(logits)

    def close(self) -> None:
        super().close()
        self.sessions.clear()
        self.layers = []


class OnnxRuntimeWalk(Walk):
    """The cache of one sequence as NumPy arrays, and each layer's bindings to it."""

    def __init__(self, model: OnnxRuntimeModel, length: int):
        config = model.config
        super().__init__(config, length, slots=length)
        self.model = model
        layers, size = config.layers, config.head_size
        self.h = np.zeros((layers + 1, 1, length, config.d_model), np.float32)
        self.q = np.zeros((layers, 1, length, config.heads, size), np.float32)
        self.k = np.zeros((layers, 1, config.kv_heads, length, size), np.float32)
        self.v = np.zeros_like(self.k)
        self.positions = np.arange(length)[None]
        self.write_index = np.zeros(1, np.int64)
        self.track_num = np.array([min(model.capacity.track_num, length)])
        self.watched = NONE
        self.space = {"attention": np.zeros(0, np.float32), "before": np.zeros(0, np.float32)}
        self.attention = self._rows("attention", 0)  # [L, H, N, S], rows of `watched`
        self.recall = model.sessions["recall"].io_binding()
        bind(self.recall.bind_input, "k_cache", self.k[:, 0])
        self.bindings = [self._bind(i) for i in range(layers)]
        self.bound = [(0, -1)] * layers  # rows and watched rows that each layer's bindings have

    def _bind(self, index: int) -> ort.IOBinding:
        """Bind what never changes: the caches and the slot where rows are written."""
        binding = self.model.layers[index].io_binding()
        bind(binding.bind_input, "write_index", self.write_index)
        for name, array in (("k_cache", self.k[index]), ("v_cache", self.v[index])):
            bind(binding.bind_input, name, array)
            bind(binding.bind_output, f"{name}_out", array)
        return binding

    def move(self, target: Slots, source: Slots) -> None:
        if len(target):
            for array in (self.h[:, 0], self.q[:, 0], self.positions):
                array[:, target] = array[:, source]
            for array in (self.k[:, 0], self.v[:, 0]):
                array[:, :, target] = array[:, :, source]

    def embed(self, ids: Slots) -> None:
        (self.h[0, :, : len(ids)],) = self.model.run("embed", ["hidden"], ids=ids[None])

    def watch(self, *rows: Slots) -> None:
        """Have the layers leave the attention of these rows in `attention` [L, H, N, S]."""
        self.watched = np.concatenate(rows)
        self.attention = self._rows("attention", len(self.watched))
        self.bound = [(0, -1)] * self.config.layers

    def _rows(self, name: str, count: int) -> NDArray[np.float32]:
        """Memory for `count` attention rows of each layer and head, the same in every step: fresh pages are slow."""
        shape = self.config.layers, self.config.heads, count, self.length
        size = math.prod(shape)
        if size > len(self.space[name]):
            self.space[name] = np.empty(size + size // 2, np.float32)
        return self.space[name][:size].reshape(shape)

    def layer(self, index: int, rows: int) -> None:
        binding = self.bindings[index]
        if self.bound[index] != (rows, len(self.watched)):
            bind(binding.bind_input, "hidden", self.h[index, :, :rows])
            bind(binding.bind_input, "positions", self.positions[:, :rows])
            bind(binding.bind_input, "watched", self.watched)
            bind(binding.bind_output, "hidden_out", self.h[index + 1, :, :rows])
            bind(binding.bind_output, "q", self.q[index, :, :rows])
            bind(binding.bind_output, "attention", self.attention[None, index])
            self.bound[index] = rows, len(self.watched)
        with translated(layer_name(index)):
            self.model.layers[index].run_with_iobinding(binding)

    def whole(self, rows: int, watch: Watch | None, first: int = 0) -> list[Slots]:
        self.watch(NONE if watch is None else watch.window)
        for index in range(first, self.config.layers):
            self.layer(index, rows)
        if watch is None:
            return []
        (probes,) = self.model.run("probe", ["probe"], **self._seen(watch, first, tracked=0))
        return list(probes)

    def reuse(self, rows: int, watch: Watch, gamma: float) -> Reuse:
        """All layers at once: that wastes at most a reuse pass, before a refresh that costs many."""
        before = self._rows("before", len(watch.tracked))
        q_prev = np.ascontiguousarray(self.q[:, 0, watch.tracked])
        bind(self.recall.bind_input, "q_prev", q_prev)
        bind(self.recall.bind_output, "before", before)
        with translated("recall"):
            self.model.sessions["recall"].run_with_iobinding(self.recall)
        self.watch(watch.tracked, watch.window)
        for index in range(self.config.layers):
            self.layer(index, rows)
        sigma, probes = self.model.run(
            f"drift_{watch.kind}", ["sigma", "probe"], before=before, **self._seen(watch, 0, len(watch.tracked))
        )
        return Reuse.of(sigma.tolist(), list(probes), gamma)

    def _seen(self, watch: Watch, first: int, tracked: int) -> dict[str, Any]:
        """What the layers from `first` on have left for the drift test and the probe."""
        return {
            "attention": self.attention[first:], "window_rows": np.arange(len(self.watched)) >= tracked,
            "probe_keys": watch.probe_keys, "track_num": self.track_num,
        }  # fmt: skip

    def head(self, rows: Slots) -> tuple[Slots, NDArray[np.float32]]:
        token, confidence = self.model.run("head", ["token", "confidence"], hidden=self.h[-1], rows=rows[None])
        return token[0], confidence[0]

    def logits(self, rows: Slots) -> NDArray[np.float32]:
        return np.asarray(self.model.run("head", ["logits"], hidden=self.h[-1], rows=rows[None])[0][0])

    def hidden(self, index: int, rows: int) -> NDArray[np.float32]:
        return self.h[index, 0, :rows].copy()

    def set_hidden(self, index: int, hidden: NDArray[np.float32]) -> None:
        self.h[index, 0, : len(hidden)] = hidden


def bind(binder: Any, name: str, array: NDArray[Any]) -> None:
    """Bind the memory of a contiguous array; the walk keeps it alive."""
    assert array.flags.c_contiguous, name
    binder(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
