"""A fake NVIDIA GPU and TensorRT: they run the GPU back ends' logic on a machine with neither.

The fake checks the rules of CUDA and TensorRT: queued work runs only when the host waits, shapes must lie in the
chosen profile, every input and output needs an address inside one allocation, a cache's output must alias its input,
nothing may wait while a graph is captured, and a captured graph replays the addresses it was captured with, in a
context that still has the same shapes and addresses. docs/GPU.md lists the rules with their sources. A serialised
engine is the ONNX graph that TensorRT would compile; ONNX Runtime runs it on the fake's memory.
"""

import json
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from engines.errors import BackendError
from engines.gpu.cuda import ALIGNMENT, LARGEST_PITCH, Address, Cuda
from engines.gpu.executor import REUSE
from tests.support.cuda_kernels import on_the_host, without_kernel

VERSION = "99.0.fake"
INSTALLED = ort.__version__
INFERENCE_SESSION = ort.InferenceSession
NATIVE = {"RotaryEmbedding": "ROTARY_EMBEDDING", "TensorScatter": "KV_CACHE_UPDATE", "Attention": "ATTENTION_INPUT"}


class FakeCuda(Cuda):
    """Device memory as NumPy arrays at invented addresses, and a queue of work that runs at `sync`."""

    latest: "FakeCuda"

    def __init__(self, device: int = 0):
        self.name, self.capability, self.stream = "Fake GPU", (8, 9), 7
        self.owned: list[Address] = []
        self.hosts = set()
        self.regions: dict[Address, NDArray[np.uint8]] = {}
        self.end, self.limit = 0x10000, 1 << 30
        self.waits = 0
        self.queue: list[Callable[[], None]] = []
        self.recording: list[Callable[[], None]] | None = None
        self.counts = dict.fromkeys(("launch", "capture", "upload", "download", "run"), 0)
        self.capturing, self.fails_captures = False, False
        self.graphs: list[Any] = []  # that are not destroyed
        self.contexts: weakref.WeakSet[Any] = weakref.WeakSet()
        self.broken: list[str] = []  # rules that were broken where nobody listens
        type(self).latest = self

    def alloc(self, size: int, what: str) -> Address:
        if sum(region.size for at, region in self.regions.items() if at not in self.hosts) + size > self.limit:
            raise BackendError(f"out of GPU memory: {what}")
        address, self.end = self.end, self.end + -(-max(size, 1) // 4096) * 4096 + 4096
        self.regions[address] = np.zeros(max(size, 1), np.uint8)
        self.owned.append(address)
        return address

    def memory(self) -> tuple[int, int]:
        return self.limit - sum(region.size for at, region in self.regions.items() if at not in self.hosts), self.limit

    def at(self, address: Address, size: int) -> NDArray[np.uint8]:
        """The memory at an address; fails if it does not lie within one allocation."""
        for base, region in self.regions.items():
            if base <= address and address + size <= base + region.size:
                return region[address - base : address - base + size]
        raise AssertionError(f"{size} bytes at {address:#x} lie in no allocation")

    def pinned(self, size: int) -> NDArray[np.uint8]:
        limit, self.limit = self.limit, 1 << 60  # which counts device memory alone
        address, self.limit = self.alloc(size, "page-locked memory"), limit
        self.hosts.add(address)
        return self.regions[address][:size]  # freed like the rest

    def push(self, work: Callable[[], None], kind: str = "") -> None:
        """Queue `work`, or record it while a graph is captured; `counts` counts it under `kind`."""
        if kind:
            self.counts[kind] += 1
        (self.queue if self.recording is None else self.recording).append(work)

    def upload(self, target: Address, source: NDArray[Any]) -> None:
        raw = source.view(np.uint8).reshape(-1)
        self.push(lambda: np.copyto(self.at(target, raw.size), raw), "upload")

    def download(self, target: NDArray[Any], source: Address) -> None:
        raw = target.view(np.uint8).reshape(-1)
        self.push(lambda: np.copyto(raw, self.at(source, raw.size)), "download")

    def copy(self, target: Address, source: Address, size: int) -> None:
        self.push(lambda: np.copyto(self.at(target, size), self.at(source, size)))

    def copy_rows(self, target: Address, target_pitch: int, source: Address, pitch: int, width: int, rows: int) -> None:
        assert width <= pitch and width <= target_pitch, "rows overlap"
        if max(pitch, target_pitch) > LARGEST_PITCH:
            return super().copy_rows(target, target_pitch, source, pitch, width, rows)

        def work() -> None:
            for row in range(rows):
                np.copyto(self.at(target + row * target_pitch, width), self.at(source + row * pitch, width))

        self.push(work)

    def copy_planes(
        self, target: Address, target_pitch: int, target_height: int, source: Address, pitch: int, height: int,
        width: int, rows: int, planes: int,
    ) -> None:  # fmt: skip
        assert rows <= height and rows <= target_height, "planes overlap"
        for plane in range(planes):
            to, where = target + plane * target_height * target_pitch, source + plane * height * pitch
            self.copy_rows(to, target_pitch, where, pitch, width, rows)

    def sync(self) -> None:
        assert self.recording is None, "waiting while a graph is captured"
        self.waits += 1
        work, self.queue = self.queue, []
        for item in work:
            item()

    def capture(self, work: Callable[[], None]) -> Any:
        self.counts["capture"] += 1
        self.recording, self.capturing = [], True
        try:
            work()
            if self.fails_captures:
                raise BackendError("operation not permitted when stream is capturing")
            self.graphs.append(self.recording)
            return self.recording
        finally:
            self.recording, self.capturing = None, False

    def launch(self, graph: Any) -> None:
        self.counts["launch"] += 1
        for item in graph:
            self.push(item)

    def destroy(self, graph: Any) -> None:
        def launched() -> None:
            raise AssertionError("a freed graph is launched")

        assert not self.queue, "queued work may be that of the destroyed graph"
        self.graphs = [other for other in self.graphs if other is not graph]
        graph[:] = [launched]

    def free(self, address: Address) -> None:
        assert not self.queue, "queued work may use the freed memory"
        self.owned.remove(address)
        self.hosts.discard(address)
        del self.regions[address]

    def close(self) -> None:
        self.sync()
        assert not self.graphs, "a graph outlives the memory it contains"
        assert not len(self.contexts), "a context outlives its scratch memory"
        assert not self.broken, self.broken
        while self.owned:
            self.free(self.owned[-1])


class Network:
    """An ONNX model in place of a TensorRT network."""

    def __init__(self) -> None:
        self.model = onnx.ModelProto()

    @property
    def num_layers(self) -> int:
        return len(self.model.graph.node)

    def get_layer(self, index: int) -> Any:
        kind = self.model.graph.node[index].op_type
        return SimpleNamespace(type=SimpleNamespace(name=NATIVE.get(kind, kind.upper())))

    def __iter__(self) -> Iterator[Any]:
        return map(self.get_layer, range(self.num_layers))

    @property
    def num_inputs(self) -> int:
        return len(self.model.graph.input)

    def get_input(self, index: int) -> Any:
        value = self.model.graph.input[index]
        shape = [-1 if dim.dim_param else dim.dim_value for dim in value.type.tensor_type.shape.dim]
        return SimpleNamespace(name=value.name, dtype=None, shape=tuple(shape), is_shape_tensor=False)


class Parser:
    """Parses an ONNX model into a network, without errors."""

    num_errors = 0

    def __init__(self, network: Network, logger: Any):
        self.network = network

    def parse(self, content: bytes) -> bool:
        self.network.model = onnx.load_from_string(content)
        return True


class Profile:
    """Minimum, optimum and maximum shapes of each input."""

    def __init__(self) -> None:
        self.spans: dict[str, Any] = {}

    def set_shape(self, name: str, *dims: Any) -> None:
        self.spans[name] = [list(d) for d in dims]


class Config:
    """Optimisation profiles and compute capabilities of a build."""

    num_compute_capabilities, DLA_core, default_device_type, max_aux_streams = 0, -1, None, None

    def __init__(self) -> None:
        self.profiles: list[dict[str, Any]] = []
        self.flags: set[Any] = set()

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def set_flag(self, flag: Any) -> None:
        self.flags.add(flag)

    def get_flag(self, flag: Any) -> bool:
        return flag in self.flags

    def set_compute_capability(self, capability: Any, index: int) -> None:
        assert index < self.num_compute_capabilities

    def add_optimization_profile(self, profile: Profile) -> None:
        self.profiles.append(profile.spans)


class Builder:
    """Serialises a network as its profiles, one line of JSON, and its ONNX model."""

    def __init__(self, logger: Any):
        pass

    def create_network(self, flags: int) -> Network:
        return Network()

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes:
        settings: dict[str, Any] = {"profiles": config.profiles, "streams": config.max_aux_streams}
        settings["flags"] = sorted(flag.name for flag in config.flags)
        return json.dumps(settings).encode() + b"\n" + bytes(network.model.SerializeToString())


class Runtime:
    """Deserialises engines for the latest fake GPU."""

    def __init__(self, logger: Any):
        self.cuda = FakeCuda.latest

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        settings, _, content = plan.partition(b"\n")
        return Engine(self.cuda, json.loads(settings), onnx.load_from_string(content))


class Engine:
    """An ONNX Runtime session, with the profiles of the build."""

    def __init__(self, cuda: FakeCuda, settings: dict[str, Any], model: onnx.ModelProto):
        self.cuda, self.profiles, self.model = cuda, settings["profiles"], model
        self.user_allocation = Flag.REQUIRE_USER_ALLOCATION.name in settings["flags"]
        assert settings["streams"] == 0, "auxiliary streams cost events in every pass"
        for tensor in model.graph.initializer:
            if tensor.name.startswith("rotary_"):  # ONNX Runtime, unlike TensorRT, needs a line for each row of a pass
                table = np.pad(onnx.numpy_helper.to_array(tensor), ((0, 4096), (0, 0)))
                tensor.CopyFrom(onnx.numpy_helper.from_array(table, tensor.name))
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        self.session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.types = {
            v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type)
            for v in (*model.graph.input, *model.graph.output)
        }
        self.fixed = {
            v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
            for v in model.graph.input
            if not any(d.dim_param for d in v.type.tensor_type.shape.dim)
        }
        self.aliases = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "TensorScatter"}
        self.device_memory_size_v2 = max(
            self.get_device_memory_size_for_profile_v2(index) for index in range(len(self.profiles))
        )

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.profiles)

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        """As the compiler's log has it: a general profile wants many times what the fixed one of a reuse pass does."""
        return len(self.model.graph.node) << (10 if profile == REUSE else 14)

    def create_runtime_config(self) -> "RuntimeConfig":
        return RuntimeConfig()

    def create_execution_context(self, how: "RuntimeConfig | Strategy") -> Any:
        config = how if isinstance(how, RuntimeConfig) else RuntimeConfig()
        config.strategy = config.strategy or how
        assert config.strategy is Strategy.USER_MANAGED
        context = Context(self, config.dynamic_shapes_kernel_specialization_strategy is Specialisation.EAGER)
        self.cuda.contexts.add(context)
        weakref.finalize(context, destroyed, self.cuda)
        return context


def destroyed(cuda: FakeCuda) -> None:
    """Note where a context is destroyed while its work may be queued: Python ignores what is raised here."""
    if cuda.queue:
        cuda.broken.append("a context was destroyed with work queued")


class RuntimeCache:
    """The kernels that were compiled; loads what an equal one wrote."""

    def __init__(self) -> None:
        self.loaded: bytes | None = None

    def deserialize(self, content: bytes) -> bool:
        self.loaded = content if content.startswith(b"kernels") else None
        return self.loaded is not None

    def serialize(self) -> bytes:
        return b"kernels of the fake GPU"


class Specialisation(Enum):
    LAZY, EAGER, NONE = range(3)


class RuntimeConfig:
    """How a context is made."""

    def __init__(self) -> None:
        self.strategy: Any = None
        self.cache: RuntimeCache | None = None
        self.dynamic_shapes_kernel_specialization_strategy = Specialisation.LAZY

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class Context:
    """An execution context, which checks what is bound."""

    def __init__(self, engine: Engine, eager: bool):
        self.engine, self.eager, self.spans, self.profile = engine, eager, {}, 0  # type: ignore[var-annotated]
        self.addresses: dict[str, Address] = {}
        self.shapes = dict(engine.fixed)
        self.memory = 0

    def set_device_memory(self, memory: Address, size: int) -> None:
        assert self.spans and size >= self.engine.get_device_memory_size_for_profile_v2(self.profile)
        assert memory % ALIGNMENT == 0, f"scratch memory at {memory:#x} is not aligned"
        self.engine.cuda.at(memory, size)
        self.memory = memory

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.spans, self.profile = self.engine.profiles[profile], profile
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.user_allocation and bool(self.memory)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name in self.engine.fixed:
            assert shape == self.engine.fixed[name], (name, shape, self.engine.fixed[name])
        elif not all(a <= n <= b for a, n, b in zip(self.spans[name][0], shape, self.spans[name][2], strict=True)):
            return False
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: Address) -> bool:
        assert name in self.engine.types, f"the engine has no input or output {name}"
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        cuda, engine = self.engine.cuda, self.engine
        addresses, shapes, captured = dict(self.addresses), dict(self.shapes), cuda.recording is not None
        assert self.memory, "the context has no scratch memory"
        assert set(addresses) == set(engine.types), set(engine.types) ^ set(addresses)
        unaligned = [name for name, address in addresses.items() if address % ALIGNMENT]
        assert not unaligned, f"{unaligned} are not bound at multiples of {ALIGNMENT} bytes"
        assert not captured or engine.user_allocation, "an engine without REQUIRE_USER_ALLOCATION is captured"
        assert not captured or self.eager, "a graph is captured with fallback kernels"
        for output, source in engine.aliases.items():
            assert addresses[output] == addresses[source], f"{output} does not alias {source}"

        def work() -> None:
            assert not captured or shapes == self.shapes, "the context of a captured graph has other shapes now"
            assert not captured or addresses == self.addresses, (
                "the context of a captured graph has other addresses now"
            )
            cuda.at(self.memory, engine.get_device_memory_size_for_profile_v2(self.profile))
            feeds = {}
            for tensor in engine.session.get_inputs():
                dtype, shape = np.dtype(engine.types[tensor.name]), shapes[tensor.name]
                raw = cuda.at(addresses[tensor.name], int(np.prod(shape)) * dtype.itemsize)
                feeds[tensor.name] = raw.view(dtype).reshape(shape).copy()
            names = [tensor.name for tensor in engine.session.get_outputs()]
            for name, value in zip(names, engine.session.run(names, feeds), strict=True):
                assert value.dtype == engine.types[name], (name, value.dtype)
                raw = np.ascontiguousarray(value).view(np.uint8).reshape(-1)
                np.copyto(cuda.at(addresses[name], raw.size), raw)

        cuda.push(work, "run")
        return True


ComputeCapability = Enum("ComputeCapability", ["NONE", "CURRENT", "SM75", "SM80", "SM86", "SM89", "SM120"])


class Strategy(Enum):
    USER_MANAGED = 2


class Severity(Enum):
    ERROR, INTERNAL_ERROR = 1, 2


class Flag(Enum):
    TF32, REQUIRE_USER_ALLOCATION = 1, 2


class CreationFlag(Enum):
    """All networks are strongly typed, as from TensorRT 11 on: there is no flag for it."""


class Verbosity(Enum):
    LAYER_NAMES_ONLY = 0


class Logger:
    """A logger that is silent."""

    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)
    Severity = Severity

    def __init__(self, *_: Any) -> None:
        pass


def module() -> ModuleType:
    """The module that `import tensorrt` finds."""
    found = ModuleType("tensorrt")
    found.__spec__ = ModuleSpec("tensorrt", None)
    contents = dict(
        __version__=VERSION, ILogger=Logger, Logger=Logger, Builder=Builder, OnnxParser=Parser, Runtime=Runtime,
        ComputeCapability=ComputeCapability, NetworkDefinitionCreationFlag=CreationFlag,
        DynamicShapesKernelSpecializationStrategy=Specialisation,
        ExecutionContextAllocationStrategy=Strategy, BuilderFlag=Flag, ProfilingVerbosity=Verbosity,
        DeviceType=SimpleNamespace(DLA="DLA"), init_libnvinfer_plugins=lambda logger, namespace: True,
    )  # fmt: skip
    vars(found).update(contents)
    return found


@contextmanager
def fake_gpu(fp32: bool = True) -> Iterator[type[FakeCuda]]:
    """Make the fake the installed TensorRT and the only GPU.

    With `fp32` it compiles that precision too, so that its tokens can be compared exactly with the other back ends'.
    """
    import engines.trt.model
    import export.compilers.tensorrt

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", module())
        patch.setattr(engines.trt.model, "Cuda", FakeCuda)
        if fp32:
            patch.setattr(export.compilers.tensorrt, "check_precision", lambda precision: None)
        yield FakeCuda


class GpuSession:
    """A session of ONNX Runtime on the fake GPU: bound by address, run on its memory when the host waits.

    As with the CUDA provider, every node needs a kernel there, and none may compute with shapes.
    """

    def __init__(self, cuda: FakeCuda, path: str, given: ort.SessionOptions, settings: dict[str, str]):
        assert given.get_session_config_entry("session.disable_cpu_ep_fallback") == "1", "nodes may fall to the CPU"
        assert settings["user_compute_stream"] == str(cuda.stream), "a stream of its own: runs are out of order"
        assert settings["use_tf32"] == "0" and settings["arena_extend_strategy"] == "kSameAsRequested"
        model = onnx.load(path)
        assert not without_kernel(model, ort.__version__) and not on_the_host(model), "nodes fall to the CPU"
        self.inputs = [v.name for v in model.graph.input]
        self.outputs = [v.name for v in model.graph.output]
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        self.cuda, self.session = cuda, INFERENCE_SESSION(path, options, providers=["CPUExecutionProvider"])

    def io_binding(self) -> Any:
        bound: dict[str, tuple[Any, tuple[int, ...], Address]] = {}

        def bind(name: str, kind: str, device: int, dtype: Any, shape: tuple[int, ...], address: Address) -> None:
            assert (kind, device) == ("cuda", 0)
            bound[name] = np.dtype(dtype), shape, address

        return SimpleNamespace(bind_input=bind, bind_output=bind, bound=bound)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        wait = options.get_run_config_entry("disable_synchronize_execution_providers")
        assert wait == "1", "a run waits for the stream"
        bound = dict(binding.bound)
        assert set(bound) == {*self.inputs, *self.outputs}

        def memory(name: str) -> NDArray[Any]:
            dtype, shape, address = bound[name]
            raw = self.cuda.at(address, int(np.prod(shape)) * dtype.itemsize)
            return np.asarray(raw.view(dtype).reshape(shape))

        def work() -> None:
            feeds = {name: memory(name).copy() for name in self.inputs}
            for name, value in zip(self.outputs, self.session.run(self.outputs, feeds), strict=True):
                memory(name)[...] = value

        self.cuda.push(work, "run")


@contextmanager
def fake_provider() -> Iterator[None]:
    """Make ONNX Runtime appear to have a CUDA provider, with the fake as its GPU."""
    import engines.ort.gpu as gpu

    def opened(path: str, options: ort.SessionOptions, providers: list[Any]) -> Any:
        if providers == ["CPUExecutionProvider"]:
            return INFERENCE_SESSION(path, options, providers=providers)
        ((_, settings),) = providers
        return GpuSession(FakeCuda.latest, path, options, settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "Cuda", FakeCuda)
        patch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
        patch.setattr(ort, "InferenceSession", opened)
        # Some tests run with the oldest ONNX Runtime for CPUs, and some with a version of their own.
        if ort.__version__ == INSTALLED and tuple(map(int, INSTALLED.split(".")[:2])) < gpu.OLDEST:
            patch.setattr(ort, "__version__", ".".join(map(str, (*gpu.OLDEST, 0))))
        yield
