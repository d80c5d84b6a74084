"""TensorRT: one engine for all layers of a shape, weights and caches on the GPU.

A model holds the plans of a bundle, one set for each length, and the weights of
every part as device memory that plans read through their inputs, so that a
weight is there once for all its profiles and lengths. How a sequence is walked
is in `engines.tensorrt_walk`. Nothing here knows windows, gamma or text.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.bundle import REBUILD, Bundle
from engines.cuda import Address, Cuda
from engines.errors import BackendError, BundleError, DeviceError
from engines.flavour import CURRENT, Flavour, find
from engines.session import Model
from engines.tensorrt_walk import TensorRTWalk
from engines.weights import locate


class Engine:
    """A deserialised plan and a context for each profile it is run with."""

    def __init__(self, name: str, engine: Any, cuda: Cuda):
        self.name, self.engine, self.cuda = name, engine, cuda
        self.contexts: dict[int, Context] = {}

    def context(self, profile: int) -> "Context":
        if profile not in self.contexts:
            context = self.engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(profile, self.cuda.stream):
                raise BackendError(
                    f"TensorRT cannot run {self.name} with profile {profile}: most likely the GPU's memory is full; "
                    "close other programs, or build with a smaller --max-length"
                )
            self.cuda.sync()
            self.contexts[profile] = Context(self.name, context)
        return self.contexts[profile]

    def run(self, profile: int, ports: dict[str, tuple[Address, tuple[int, ...] | None]]) -> None:
        """Queue one run. `ports` gives every port's address, and the shape of inputs with dynamic axes."""
        context = self.context(profile)
        context.bind(ports)
        context.enqueue(self.cuda.stream)


class Context:
    """An execution context that is told only what changed."""

    def __init__(self, name: str, context: Any):
        self.name, self.context = name, context
        self.bound: dict[str, tuple[Address, tuple[int, ...] | None]] = {}

    def bind(self, ports: dict[str, tuple[Address, tuple[int, ...] | None]]) -> None:
        for port, (address, shape) in ports.items():
            known, old = self.bound.get(port, (None, None))
            ok = known == address or self.context.set_tensor_address(port, address)
            if shape is not None and shape != old:
                ok = ok and self.context.set_input_shape(port, shape)
            if not ok:
                raise BackendError(f"TensorRT refuses {port} {shape} of {self.name}; {REBUILD}")
            self.bound[port] = address, shape

    def enqueue(self, stream: int) -> None:
        if not self.context.execute_async_v3(stream):
            raise BackendError(f"TensorRT failed on {self.name}; check it with `python -m export verify`")


class TensorRTModel(Model):
    """Weights of all parts on the GPU, and the engines of each length that was asked for."""

    backend = "tensorrt"

    def __init__(self, bundle: Bundle, flavour: str | None = None, device: int = 0, threads: int | None = None):
        super().__init__(bundle)
        self.entry = bundle.engines(self.backend)
        self.cuda = Cuda(device)
        self.flavour = compatible(bundle, self.entry, flavour, self.cuda)
        self.runtime = self.flavour.module.Runtime(self.flavour.module.Logger(self.flavour.module.Logger.ERROR))
        self.weights = {part: self._upload(part) for part in self.config.parts}
        self.plans: dict[str, Engine] = {}  # by file
        self.walks: dict[int, TensorRTWalk] = {}  # by slots: memory and graph serve one sequence after the other

    def _upload(self, part: str) -> dict[str, Address]:
        path = self.bundle.weights(part)
        stored = np.memmap(path, np.uint8, "r")
        entries = locate(path)
        addresses = {}
        for name, entry in entries.items():
            addresses[name] = self.cuda.alloc(entry.length, f"{name} of {part}")
            self.cuda.upload(addresses[name], stored[entry.offset : entry.offset + entry.length])
        self.cuda.sync()
        return addresses

    def engine(self, part: str, slots: int) -> Engine:
        """The engine of `part` for `slots` slots, deserialised when it is first asked for."""
        name = self.entry["parts"][part]["plans"][str(slots)]
        if name not in self.plans:
            engine = self.runtime.deserialize_cuda_engine(self.bundle.file(name).read_bytes())
            if engine is None:
                raise DeviceError(
                    f"{self.flavour.name} {self.flavour.version} cannot load {name} on {self.cuda.name}, compute "
                    f"capability {capability(self.cuda)} (built for {', '.join(self.entry['capabilities'])}); "
                    f"{REBUILD} --backend tensorrt --capability {capability(self.cuda)}"
                )
            self.plans[name] = Engine(part, engine, self.cuda)
        return self.plans[name]

    @property
    def device(self) -> str:
        return f"{self.cuda.name}, {self.flavour.name} {self.flavour.version}"

    def walk(self, length: int) -> "TensorRTWalk":
        needed = length + self.capacity.rows
        slots = next(count for count in sorted(self.entry["slots"]) if count >= needed)
        if slots not in self.walks:
            with self._unwound():
                self.walks[slots] = TensorRTWalk(self, slots)
        self.walks[slots].start(length)
        return self.walks[slots]

    @contextmanager
    def _unwound(self) -> Iterator[None]:
        """Give back what was allocated in the block if it fails."""
        known = len(self.cuda.owned)
        try:
            yield
        except BackendError:
            for address in self.cuda.owned[known:]:
                self.cuda.free(address)
            raise

    def forward(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        logits = []
        for row in ids:
            walk = self.walk(len(row))
            walk.embed(np.concatenate([row, np.zeros(walk.slots - len(row), np.int64)]))
            walk.whole(walk.slots, None)
            logits.append(walk.logits(np.arange(len(row))))
        return np.stack(logits)

    def close(self) -> None:
        if not self.closed:
            self.walks.clear()
            self.plans.clear()
            self.cuda.close()
        super().close()


def capability(cuda: Cuda) -> str:
    return f"{cuda.capability[0]}.{cuda.capability[1]}"


def version(name: str) -> tuple[int, ...]:
    return tuple(map(int, name.split(".")))


def compatible(bundle: Bundle, entry: dict[str, Any], flavour: str | None, cuda: Cuda) -> Flavour:
    """The flavour that can run a bundle's engines; raises BundleError or DeviceError where none can."""
    found = find(flavour or entry["flavour"])
    built = f"{entry['flavour']} {entry['version']}"
    if (found.name, found.version) != (entry["flavour"], entry["version"]):
        raise BundleError(
            f"{bundle.root}: its engines were built by {built} and {found.name} {found.version} is installed; "
            "install that version, or add engines with `python -m export build --backend tensorrt`"
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
