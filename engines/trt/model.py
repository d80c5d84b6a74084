"""TensorRT: one engine for all layers of a shape, weights and caches on the GPU.

A model holds the plans of a bundle, one set for each length, and the weights of
every part as device memory that plans read through their inputs, so that a
weight is there once for all its profiles and lengths. How a sequence is walked
is in `engines.gpu.model`. Nothing here knows windows, gamma or text.
"""

from typing import Any

import numpy as np

from engines.bundle import Bundle, rebuild
from engines.errors import BackendError, BundleError, DeviceError
from engines.gpu.cuda import Address, Cuda
from engines.gpu.model import GpuModel
from engines.gpu.passes import Bindings
from engines.signatures.gpu import gpu_signatures
from engines.trt.package import CURRENT, TensorRTPackage, find
from engines.weights import locate


class ScratchMemory:
    """Memory that engines compute in. One runs after the other on one stream, so all contexts share it."""

    def __init__(self, cuda: Cuda):
        self.cuda, self.address, self.size = cuda, 0, 0

    def of(self, size: int) -> tuple[Address, int]:
        """The address and size of at least `size` bytes. Smaller ones stay: captured graphs know their address."""
        if size > self.size or not self.address:
            self.address, self.size = self.cuda.alloc(size, "what engines compute in"), size
        return self.address, self.size


class TrtEngine:
    """A deserialised engine, and a context for each profile and batch size it is run with.

    A captured graph holds only as long as its context keeps its shapes, so no two sizes share one.
    """

    def __init__(self, name: str, engine: Any, inputs: list[str], room: ScratchMemory, user_managed: Any):
        self.name, self.engine, self.inputs, self.room = name, engine, inputs, room
        self.cuda, self.user_managed = room.cuda, user_managed
        self.contexts: dict[tuple[int, int], Context] = {}

    def context(self, profile: int, batch: int) -> "Context":
        if (profile, batch) not in self.contexts:
            context = self.engine.create_execution_context(self.user_managed)
            if context is None or not context.set_optimization_profile_async(profile, self.cuda.stream):
                raise BackendError(
                    f"TensorRT cannot run {self.name} with profile {profile}: most likely the GPU's memory is full; "
                    "close other programs, or build with a smaller --max-length"
                )
            self.cuda.sync()
            context.set_device_memory(*self.room.of(self.engine.device_memory_size_v2))
            self.contexts[profile, batch] = Context(self.name, context, set(self.inputs))
        return self.contexts[profile, batch]

    def run(self, profile: int, ports: Bindings) -> None:
        (batch, *_) = ports[self.inputs[0]][1]
        context = self.context(profile, batch)
        context.bind(ports)
        context.enqueue(self.cuda.stream)


class Context:
    """An execution context that is told only what changed."""

    def __init__(self, name: str, context: Any, inputs: set[str]):
        self.name, self.context, self.inputs = name, context, inputs
        self.bound: Bindings = {}

    def bind(self, ports: Bindings) -> None:
        for port, (address, shape) in ports.items():
            known, old = self.bound.get(port, (None, None))
            ok = known == address or self.context.set_tensor_address(port, address)
            if port in self.inputs and shape != old:
                ok = ok and self.context.set_input_shape(port, shape)
            if not ok:
                raise BackendError(f"TensorRT refuses {port} {shape} of {self.name}; build the bundle again")
            self.bound[port] = address, shape

    def enqueue(self, stream: int) -> None:
        if not self.context.execute_async_v3(stream):
            raise BackendError(f"TensorRT failed on {self.name}; check it with `python -m export verify`")


class TensorRTModel(GpuModel):
    """Weights of all parts on the GPU, and the engines of each length that was asked for."""

    backend = "tensorrt"
    capturable = True

    def __init__(self, bundle: Bundle, flavour: str | None = None, device: int = 0):
        super().__init__(bundle)
        self.entry = bundle.engines(self.backend)
        self.cuda = Cuda(device)
        with self.cuda.closed_on_error():
            self.flavour = compatible(bundle, self.entry, flavour, self.cuda)
            self.runtime = self.flavour.module.Runtime(self.flavour.module.Logger(self.flavour.module.Logger.ERROR))
            self.weights = {part: self._upload(part) for part in self.config.parts}
        signatures = gpu_signatures(self.config, bundle.manifest.precision, self.capacity.track_num)
        self.inputs = {signature.name: [port.name for port in signature.inputs] for signature in signatures}
        self.plans: dict[str, TrtEngine] = {}  # by file
        self.room = ScratchMemory(self.cuda)
        self.batches = {}

    def _upload(self, part: str) -> Bindings:
        path = self.bundle.weights(part)
        stored = np.memmap(path, np.uint8, "r")
        entries = locate(path)
        ports = {}
        for name, entry in entries.items():
            ports[name] = self.cuda.alloc(entry.length, f"{name} of {part}"), entry.shape
            self.cuda.upload(ports[name][0], stored[entry.offset : entry.offset + entry.length])
        self.cuda.sync()
        return ports

    def engine(self, part: str, slots: int) -> TrtEngine:
        """The engine of `part` for `slots` slots, deserialised when it is first asked for."""
        name = self.entry["parts"][part]["plans"][str(slots)]
        if name not in self.plans:
            self.plans[name] = self.load(part, name, self.inputs[part])
        return self.plans[name]

    def load(self, part: str, name: str, inputs: list[str]) -> TrtEngine:
        """The plan in the file `name`; `inputs` are the part's ports, the first with the batch as its first axis."""
        engine = self.runtime.deserialize_cuda_engine(self.bundle.file(name).read_bytes())
        if engine is None:
            raise DeviceError(
                f"{self.flavour.name} {self.flavour.version} cannot load {name} on {self.cuda.name}, compute "
                f"capability {capability(self.cuda)} (built for {', '.join(self.entry['capabilities'])}); "
                + rebuild(self.bundle.root, f" --backend tensorrt --capability {capability(self.cuda)}")
            )
        managed = self.flavour.module.ExecutionContextAllocationStrategy.USER_MANAGED
        return TrtEngine(part, engine, inputs, self.room, managed)

    @property
    def device(self) -> str:
        return f"{self.cuda.name}, {self.flavour.name} {self.flavour.version}"

    def slots_for_length(self, length: int) -> int:
        return min(int(count) for count in self.entry["slots"] if count >= length + self.capacity.rows)

    def close(self) -> None:
        self.plans.clear()
        super().close()


def capability(cuda: Cuda) -> str:
    return f"{cuda.capability[0]}.{cuda.capability[1]}"


def version(name: str) -> tuple[int, ...]:
    return tuple(map(int, name.split(".")))


def compatible(bundle: Bundle, entry: dict[str, Any], flavour: str | None, cuda: Cuda) -> TensorRTPackage:
    """The flavour that can run a bundle's engines; raises BundleError or DeviceError where none can."""
    found = find(flavour or entry["flavour"])
    built = f"{entry['flavour']} {entry['version']}"
    if (found.name, found.version) != (entry["flavour"], entry["version"]):
        raise BundleError(
            f"{bundle.root}: its engines were built by {built} and {found.name} {found.version} is installed; "
            "install that version, or add engines with "
            f"`python -m export build --backend tensorrt --out {bundle.root}`, and the options it has"
        )
    targets = entry["capabilities"]
    # Kernels for an older GPU may run on a newer one; whether they do TensorRT says when it loads the plan.
    if not any(target == CURRENT or version(target) <= cuda.capability for target in targets):
        raise DeviceError(
            f"{bundle.root}: its engines are built for compute capability {', '.join(targets)} and {cuda.name} has "
            f"{capability(cuda)}; build with --backend tensorrt --capability {capability(cuda)}, or use --backend "
            "onnxruntime"
        )
    return found
