"""A bundle on TensorRT: the engines of each length, with the weights of all parts on the GPU.

Layers of one shape share one engine, which takes their weights as inputs. So each weight is on the GPU once, for
all profiles and lengths.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from engines.bundle import Bundle
from engines.errors import INSTALL, BundleError, DeviceError, OptionError
from engines.gpu.cuda import Cuda
from engines.gpu.executor import Bindings
from engines.gpu.model import GpuModel
from engines.gpu.upload import Uploader
from engines.signatures.gpu import gpu_signatures
from engines.trt.contexts import ContextMaker
from engines.trt.engines import ScratchMemory, TrtEngine
from engines.trt.package import CURRENT, FLAVOURS, LEAN, VERSION, TensorRTPackage, installed


class TensorRTModel(GpuModel):
    """All weights on the GPU, and engines that are deserialised at their first use.

    Raises BackendError if TensorRT or cuda-python is missing or memory does not suffice, BundleError if another
    version built the engines, DeviceError if this GPU cannot run them.
    """

    backend = "tensorrt"
    capturable = True

    def __init__(self, bundle: Bundle, flavour: str | None = None, device: int = 0):
        """`flavour` names the TensorRT package (None: the one that built the engines), `device` the GPU's number."""
        super().__init__(bundle)
        self.entry = bundle.engines(self.backend)
        self.startup: dict[str, float] = {}  # seconds by what they were spent on, up to the first answer and after
        self.cuda = Cuda(device)
        with self.cuda.closed_on_error():
            self.package = compatible_package(bundle, self.entry, flavour, self.cuda)
            with self.started("files checked"):
                bundle.check(bundle.files_for(self.backend))
            trt = self.package.module
            self.runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
            with self.started("weights read and copied"):
                self.weights = self.upload_weights(self.config.parts)
        signatures = gpu_signatures(self.config, self.precision, self.capacity.track_num)
        self.inputs = {signature.name: [spec.name for spec in signature.inputs] for signature in signatures}
        self.engines: dict[str, TrtEngine] = {}  # by file
        self.scratch = ScratchMemory(self.cuda)
        self.contexts = ContextMaker(self.package, f"{self.cuda.name}-{capability(self.cuda)}", bundle.identity)

    def upload_weights(self, parts: Iterable[str]) -> dict[str, Bindings]:
        """Copy the weights of parts to new device memory; raises BackendError if they do not fit."""
        uploader = Uploader(self.cuda)
        try:
            files = self.entry["parts"]
            return {part: uploader.upload(self.bundle.file(files[part]["weights"]), part) for part in parts}
        finally:
            uploader.close()

    @contextmanager
    def started(self, what: str) -> Iterator[None]:
        """Add the seconds of the body to what the start is made of (`startup`)."""
        began = time.perf_counter()
        yield
        self.startup[what] = self.startup.get(what, 0.0) + time.perf_counter() - began

    def engine(self, part: str, slots: int) -> TrtEngine:
        name = self.entry["parts"][part]["plans"][str(slots)]
        if name not in self.engines:
            self.engines[name] = self.load_engine(part, name, self.inputs[part])
        return self.engines[name]

    def load_engine(self, part: str, name: str, inputs: list[str]) -> TrtEngine:
        """Deserialise the engine of `part` from the bundle's file `name`; raises DeviceError if this GPU cannot.

        `inputs` names the part's inputs, the first of which has the batch as its first axis.
        """
        with self.started("engines deserialised"):
            engine = self.runtime.deserialize_cuda_engine(self.bundle.file(name).read_bytes())
        if engine is None:
            built_here = CURRENT in self.entry["capabilities"]
            wanted = () if built_here else ("--capability", capability(self.cuda))
            targets = ", ".join([*self.entry["capabilities"], *self.entry.get("compatible", ())])
            raise DeviceError(
                f"{self.package.name} {self.package.version} cannot load {name} on {self.cuda.name}, compute "
                f"capability {capability(self.cuda)} (built for {targets}); " + self.bundle.rebuild(*wanted, "--force")
            )
        return TrtEngine(part, engine, inputs, self.scratch, self.contexts, self.bundle.verify)

    @property
    def device(self) -> str:
        return f"{self.cuda.name}, {self.package.name} {self.package.version}"

    def slots_for_length(self, length: int) -> int:
        return min(int(count) for count in self.entry["slots"] if count >= length + self.capacity.rows)

    def free_engines(self) -> None:
        self.contexts.save()
        while self.engines:
            self.engines.popitem()[1].close()


def capability(cuda: Cuda) -> str:
    """The GPU's compute capability, such as "8.9"."""
    return f"{cuda.capability[0]}.{cuda.capability[1]}"


def compatible_package(bundle: Bundle, entry: dict[str, Any], name: str | None, cuda: Cuda) -> TensorRTPackage:
    """The installed TensorRT package that can run a bundle's engines on a GPU.

    The package and version that built them, or `tensorrt_lean` of that version where they are built for it. Raises
    OptionError for an unknown package, BundleError if only another package or version is installed, DeviceError if the
    engines were built for newer GPUs only, BackendError if no package is installed.
    """
    if name not in (None, *FLAVOURS, LEAN):
        raise OptionError(f"unknown TensorRT package {name!r}; choose from {', '.join((*FLAVOURS, LEAN))}")
    lean = VERSION in (entry.get("compatible") or ())
    if name == LEAN and not lean:
        raise BundleError(
            f"{bundle.root}: its engines need all of {entry['flavour']}, and not {LEAN}; leave the flavour out, "
            f"or {bundle.rebuild('--compatible', VERSION, '--force')}"
        )
    runners = [entry["flavour"], LEAN] if lean else [entry["flavour"]]
    packages = installed([name] if name else runners, "lean" if name == LEAN else FLAVOURS[entry["flavour"]])
    found = next((one for one in packages if one.name in runners and one.version == entry["version"]), None)
    if found is None:
        there = " and ".join(f"{one.name} {one.version}" for one in packages)
        other = f" or {LEAN}" if lean else ""
        raise BundleError(
            f"{bundle.root}: its engines were built by {entry['flavour']} {entry['version']} and {there} is installed; "
            f"install that version{other}, or {bundle.rebuild('--force')}"
        )
    here = capability(cuda)
    if found.ahead_of_time and here not in found.capabilities():
        raise DeviceError(
            f"{found.name} {found.version} does not run on {cuda.name}, which has compute capability {here} "
            f"(it runs on {', '.join(found.capabilities())}); use --backend onnxruntime, or TensorRT itself: "
            f"{INSTALL.format(extra='gpu')}, then {bundle.rebuild('--flavour', 'tensorrt', '--force')}"
        )
    targets = entry["capabilities"]
    # Kernels for an older GPU may run on a newer one; TensorRT decides that when it loads the engine.
    if not any(target == CURRENT or tuple(map(int, target.split("."))) <= cuda.capability for target in targets):
        raise DeviceError(
            f"{bundle.root}: its engines are built for compute capability {', '.join(targets)} and {cuda.name} has "
            f"{here}; {bundle.rebuild('--capability', here, '--force')}"
        )
    return found
