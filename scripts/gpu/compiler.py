"""What TensorRT does on this GPU with one layer of LLaDA-8B's shape: loads, runs, captures, and how fast."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from engines.config import Capacity, ModelConfig
from engines.gpu.cuda import Cuda
from engines.gpu.executor import FULL, REUSE
from engines.signatures.gpu import gpu_signatures
from engines.trt.package import CURRENT, TensorRTPackage
from export.checkpoint.families.llada import FAMILY
from export.compilers import tensorrt
from scripts.gpu.report import queued, timed
from scripts.kernels import part_model

RNG = np.random.default_rng(0)
TYPES = {"HALF": np.float16, "FLOAT": np.float32, "INT64": np.int64, "INT32": np.int32, "BOOL": np.bool_}
SMALL = 2.0 / 64  # the deviation of random inputs and weights


class Layer:
    """One layer of the shape `raw`, its inputs in device memory, and the plans that are tried on them."""

    def __init__(self, cuda: Cuda, package: TensorRTPackage, raw: dict[str, Any], window: int, batch: int = 1):
        self.cuda, self.package, self.trt = cuda, package, package.module
        self.config: ModelConfig = FAMILY.read_config(raw)
        self.capacity = Capacity.of(self.config, self.config.max_length, window, 1, batch)
        self.slots = tensorrt.lengths(self.capacity)[-1]
        signature = next(s for s in gpu_signatures(self.config, "fp16", 1) if s.name == "layer_00")
        self.model = part_model(self.config, signature, "fp16", self.slots)
        self.profiles = tensorrt.profiles(signature, self.capacity, self.slots)
        self.messages: list[str] = []
        self.logger = self._logger()
        self.runtime = self.trt.Runtime(self.logger)
        self.memory: dict[str, int] = {}
        self.sizes: dict[str, int] = {}

    def _logger(self) -> Any:
        messages, trt = self.messages, self.trt

        class Log(trt.ILogger):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR, trt.ILogger.WARNING):
                    messages.append(message[:300])

        return Log()

    def plan(self, capability: str = CURRENT, user_allocation: bool = True, streams: int | None = 0) -> bytes:
        """Build a plan; RuntimeError with TensorRT's messages where it cannot."""
        trt = self.trt
        builder = trt.Builder(self.logger)
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, self.logger)
        parser.parse(self.model.SerializeToString())
        config = builder.create_builder_config()
        if streams is not None:
            config.max_aux_streams = streams
        if user_allocation:
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        for spans in self.profiles:
            config.add_optimization_profile(self._profile(builder, self.model, spans))
        config.num_compute_capabilities = 1
        config.set_compute_capability(self.package.capability(capability), 0)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RuntimeError("; ".join(self.messages[-3:]))
        return bytes(plan)

    @staticmethod
    def _profile(builder: Any, model: onnx.ModelProto, spans: Any) -> Any:
        made = builder.create_optimization_profile()
        for value in model.graph.input:
            axes = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            if any(isinstance(axis, str) for axis in axes):
                sizes = (tuple(spans[a][i] if isinstance(a, str) else a for a in axes) for i in range(3))
                made.set_shape(value.name, *sizes)
        return made

    def engine(self, plan: bytes) -> Any:
        """The deserialised plan; RuntimeError with TensorRT's messages where this GPU cannot load it."""
        engine = self.runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise RuntimeError("; ".join(self.messages[-3:]))
        return engine

    def context(self, engine: Any, profile: int = REUSE, how: str | None = "EAGER", cache: Any = None) -> Any:
        """A context whose inputs and outputs are bound; `how` its kernels are specialised."""
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if how:
            kinds = self.trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = getattr(kinds, how)
        if cache is not None:
            config.set_runtime_cache(cache)
        context = engine.create_execution_context(config)
        if context is None or not context.set_optimization_profile_async(profile, self.cuda.stream):
            raise RuntimeError("; ".join(self.messages[-3:]))
        size = engine.get_device_memory_size_for_profile_v2(profile)
        context.set_device_memory(self.allocated(f"scratch {size}", size), size)
        for name, kind, shape in self.tensors(engine, profile):
            address = self.allocated(name.replace("_cache_out", "_cache"), int(np.prod(shape)) * kind.itemsize)
            if not context.set_tensor_address(name, address):
                raise RuntimeError(f"{name}: {self.messages[-1:]}")
            if engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT and -1 in engine.get_tensor_shape(name):
                context.set_input_shape(name, shape)
        return context

    def tensors(self, engine: Any, profile: int) -> Iterator[tuple[str, np.dtype[Any], tuple[int, ...]]]:
        """Name, type and shape of each input and output in a profile, for one sequence."""
        rows = self.slots if profile == FULL else self.capacity.rows
        sizes = {"B": 1, "A": rows}
        declared = {value.name: value for value in (*self.model.graph.input, *self.model.graph.output)}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            dims = declared[name].type.tensor_type.shape.dim
            shape = tuple(sizes[dim.dim_param] if dim.dim_param else dim.dim_value for dim in dims)
            yield name, np.dtype(TYPES[engine.get_tensor_dtype(name).name]), shape

    def allocated(self, name: str, size: int) -> int:
        """Device memory of that name, made and filled at its first use."""
        if name not in self.memory or size > self.sizes.get(name, 0):
            self.memory[name], self.sizes[name] = self.cuda.alloc(size, name), size
            if not name.startswith("scratch"):
                content = self.numbers(name, size)
                self.cuda.upload(self.memory[name], content)
                self.cuda.sync()
        return self.memory[name]

    def numbers(self, name: str, size: int) -> NDArray[np.uint8]:
        """The content of an input: row numbers as positions, no mask, zero write index, and small random numbers."""
        if name == "positions":
            return np.arange(size // 8, dtype=np.int64).view(np.uint8)
        if name in ("write_index", "key_bias"):
            return np.zeros(size, np.uint8)
        chunk = (RNG.standard_normal(min(size // 2, 1 << 20)) * SMALL).astype(np.float16)
        return np.resize(chunk, size // 2).view(np.uint8)

    def output(self, name: str, count: int) -> NDArray[np.float16]:
        found = np.empty(count, np.float16)
        self.cuda.download(found, self.memory[name])
        self.cuda.sync()
        return found


def run(layer: Layer, context: Any) -> None:
    """Queue a run; RuntimeError with TensorRT's messages where it fails."""
    if not context.execute_async_v3(layer.cuda.stream):
        raise RuntimeError("; ".join(layer.messages[-3:]))


def capability_figures(layer: Layer, capability: str) -> dict[str, Any]:
    """Does a plan for `capability` build, load and run, and how long do these take?"""
    times, began = {}, time.perf_counter()
    plan = layer.plan(capability)
    times["build"], began = time.perf_counter() - began, time.perf_counter()
    engine = layer.engine(plan)
    times["load"], began = time.perf_counter() - began, time.perf_counter()
    context = layer.context(engine)
    times["context"], began = time.perf_counter() - began, time.perf_counter()
    run(layer, context)
    layer.cuda.sync()
    times["first run"] = time.perf_counter() - began
    hidden = layer.output("hidden_out", layer.capacity.rows * layer.config.d_model)
    rest = queued(lambda: run(layer, context), layer.cuda.sync)
    return {
        "plan_bytes": len(plan), "seconds": times, "ms": 1e3 * rest,
        "finite": bool(np.isfinite(hidden).all()), "deviation": float(hidden.astype(np.float32).std()),
    }  # fmt: skip


def specialisation_figures(layer: Layer, engine: Any, how: str) -> dict[str, Any]:
    """Seconds of a context and of its first runs, and milliseconds of a run with and without a graph.

    The graph is captured at once after the first run, and once more after three seconds.
    """
    began = time.perf_counter()
    context = layer.context(engine, how=how)
    made, began = time.perf_counter() - began, time.perf_counter()
    run(layer, context)
    layer.cuda.sync()
    first = time.perf_counter() - began
    found: dict[str, Any] = {
        "context_s": made, "first_run_s": first, "capturable": bool(context.is_stream_capturable(layer.cuda.stream)),
        "ms_at_once": 1e3 * queued(lambda: run(layer, context), layer.cuda.sync),
    }  # fmt: skip
    early = layer.cuda.capture(lambda: run(layer, context))
    time.sleep(3)
    late = layer.cuda.capture(lambda: run(layer, context))
    found["ms_later"] = 1e3 * queued(lambda: run(layer, context), layer.cuda.sync)
    for name, graph in (("early", early), ("late", late)):
        found[f"graph_{name}_ms"] = 1e3 * queued(partial(layer.cuda.launch, graph), layer.cuda.sync)
        found[f"graph_{name}_waited_ms"] = 1e3 * timed(partial(layer.cuda.launch, graph), layer.cuda.sync)
        layer.cuda.destroy(graph)
    return found


def capture_without_flag(layer: Layer) -> dict[str, Any]:
    """A plan without REQUIRE_USER_ALLOCATION: does its context say that it can be captured, and can it?"""
    context = layer.context(layer.engine(layer.plan(user_allocation=False)))
    run(layer, context)
    layer.cuda.sync()
    found: dict[str, Any] = {"capturable": bool(context.is_stream_capturable(layer.cuda.stream))}
    try:
        layer.cuda.destroy(layer.cuda.capture(lambda: run(layer, context)))
        found["capture"] = "works"
    except Exception as error:
        found["capture"] = str(error)
    return found


def streams_figures(layer: Layer) -> dict[str, float]:
    """Milliseconds of a captured run with no auxiliary stream and with as many as TensorRT likes."""
    found = {}
    for name, streams in (("none", 0), ("its own choice", None)):
        context = layer.context(layer.engine(layer.plan(streams=streams)))
        run(layer, context)
        layer.cuda.sync()
        graph = layer.cuda.capture(partial(run, layer, context))
        found[name] = 1e3 * queued(partial(layer.cuda.launch, graph), layer.cuda.sync)
        layer.cuda.destroy(graph)
    return found


def shared_context(layer: Layer, engine: Any) -> dict[str, Any]:
    """One context over three address sets in one captured graph, against a run of each: are the numbers the same?"""
    context = layer.context(engine)
    count = layer.capacity.rows * layer.config.d_model
    outs = [layer.allocated(f"out {number}", 2 * count) for number in range(3)]
    ins = [layer.allocated(f"in {number}", 2 * count) for number in range(3)]

    def chain() -> None:
        for source, target in zip(ins, outs, strict=True):
            context.set_tensor_address("hidden", source)
            context.set_tensor_address("hidden_out", target)
            run(layer, context)

    chain()
    layer.cuda.sync()
    eager = [layer.output(f"out {number}", count) for number in range(3)]
    graph = layer.cuda.capture(chain)
    for address in outs:
        layer.cuda.upload(address, np.zeros(count, np.float16))
    layer.cuda.sync()
    layer.cuda.launch(graph)
    layer.cuda.sync()
    again = [layer.output(f"out {number}", count) for number in range(3)]
    layer.cuda.destroy(graph)
    return {"equal": [bool((a == b).all()) for a, b in zip(eager, again, strict=True)]}


def runtime_cache(layer: Layer, engine: Any) -> dict[str, Any]:
    """Seconds of a context with an empty cache and with one that holds its kernels, and the cache's bytes."""
    seconds, content = [], b""
    for _ in range(2):
        cache = engine.create_runtime_config().create_runtime_cache()
        loaded = bool(content) and cache.deserialize(content)
        began = time.perf_counter()
        context = layer.context(engine, cache=cache)
        run(layer, context)
        layer.cuda.sync()
        seconds.append(time.perf_counter() - began)
        content = bytes(cache.serialize())
    return {"empty_s": seconds[0], "filled_s": seconds[1], "bytes": len(content), "loaded": bool(loaded)}


def misaligned(layer: Layer, engine: Any) -> dict[str, Any]:
    """An output bound four bytes from an aligned address: refused, or what? It may break CUDA for this process."""
    context = layer.context(engine)
    accepted = context.set_tensor_address("hidden_out", layer.memory["hidden_out"] + 4)
    found: dict[str, Any] = {"accepted": bool(accepted)}
    if accepted:
        try:
            run(layer, context)
            layer.cuda.sync()
            found["run"] = "works"
        except Exception as error:
            found["run"] = str(error)[:300]
    return found
