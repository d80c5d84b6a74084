"""The package `tensorrt` as its documentation has it, where it differs from `tensorrt_rtx`; on the fake GPU.

Sources: NvInfer.h and NvInferRuntime.h of TensorRT 10.15 and 11, python/src/infer/pyCore.cpp, and the pages Engine
Compatibility and Weight Streaming of its documentation. It compiles for the GPU of the machine and no other, needs one,
has no flag for allocation by the user and no runtime configuration, and loads no plan of another GPU or version.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, IntEnum
from types import ModuleType
from typing import Any

import onnx
import pytest

from tests.support import fake_gpu as fake


class Flag(Enum):
    TF32, VERSION_COMPATIBLE, EXCLUDE_LEAN_RUNTIME, WEIGHT_STREAMING = range(4)


class Level(Enum):
    NONE, AMPERE_PLUS, SAME_COMPUTE_CAPABILITY = range(3)


class CreationFlag10(IntEnum):
    """Of TensorRT 10, where a network is weakly typed unless the flag says otherwise."""

    EXPLICIT_BATCH, STRONGLY_TYPED = range(2)


class CreationFlag11(IntEnum):
    """Of TensorRT 11, in which every network is strongly typed."""

    PREFER_AOT_PYTHON_PLUGINS = 2


class Config(fake.Config):
    hardware_compatibility_level = Level.NONE

    def set_compute_capability(self, capability: Any, index: int) -> None:
        raise AttributeError("the configuration of tensorrt has no compute capabilities")


class Builder(fake.Builder):
    """Needs a GPU; serialises the settings of a build, what built it and for which GPU."""

    module: Any

    def __init__(self, logger: Any):
        if self.module.gpu is None:
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def create_network(self, flags: int) -> fake.Network:
        typed = getattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        assert typed is None or flags & 1 << typed, "a weakly typed network: the builder chooses precisions"
        return fake.Network()

    def create_builder_config(self) -> Config:
        return Config()

    def build_serialized_network(self, network: fake.Network, config: Any) -> bytes:
        settings, _, content = super().build_serialized_network(network, config).partition(b"\n")
        assert Flag.WEIGHT_STREAMING not in config.flags, "weights are inputs: there is nothing to stream"
        built = {
            "version": self.module.__version__,
            "gpu": self.module.gpu,
            "level": config.hardware_compatibility_level.name,
        }
        return json.dumps(json.loads(settings) | built).encode() + b"\n" + content


class Context(fake.Context):
    is_stream_capturable = None  # type: ignore[assignment]  # asked by RTX alone


class Engine(fake.Engine):
    """Kernels are whole in the plan, and any run can be captured after a first one."""

    create_runtime_config = None  # type: ignore[assignment]

    def __init__(self, cuda: fake.FakeCuda, settings: dict[str, Any], model: onnx.ModelProto):
        super().__init__(cuda, settings, model)
        self.user_allocation = True

    def create_execution_context(self, how: Any) -> Any:
        assert how is fake.Strategy.USER_MANAGED
        context = Context(self, eager=True)
        self.cuda.contexts.add(context)
        return context


class Runtime(fake.Runtime):
    """Loads what was built by its own version for this GPU; None for the rest, as TensorRT does."""

    module: Any
    engine_host_code_allowed = False

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        head, _, content = plan.partition(b"\n")
        settings = json.loads(head)
        assert not self.engine_host_code_allowed, "code of a bundle may run on the host"
        lean = Flag.VERSION_COMPATIBLE.name in settings["flags"]
        if lean and Flag.EXCLUDE_LEAN_RUNTIME.name not in settings["flags"]:
            return None  # the plan has code for the host
        if settings["version"] != self.module.__version__ or (self.module.lean and not lean) or not self.fits(settings):
            return None
        return Engine(self.cuda, settings, onnx.load_from_string(content))

    def fits(self, settings: dict[str, Any]) -> bool:
        """Whether the plan runs on this GPU."""
        name, capability = self.cuda.name, list(self.cuda.capability)
        if settings["level"] == Level.AMPERE_PLUS.name:
            return capability >= [8, 0]
        if settings["level"] == Level.SAME_COMPUTE_CAPABILITY.name:
            return bool(capability == settings["gpu"][1])
        return bool([name, capability] == settings["gpu"])


def module(name: str, version: str) -> ModuleType:
    """The module of the package `name`: "tensorrt", which builds and runs, or "tensorrt_lean", which runs."""
    found = fake.module()
    found.__name__ = name
    for attribute in ("ComputeCapability", "DynamicShapesKernelSpecializationStrategy"):
        delattr(found, attribute)
    lean = name == "tensorrt_lean"
    creation = CreationFlag10 if version.startswith("10.") else CreationFlag11
    contents = dict(
        __version__=version, gpu=("Fake GPU", (8, 9)), lean=lean, BuilderFlag=Flag, HardwareCompatibilityLevel=Level,
        NetworkDefinitionCreationFlag=creation,
        Builder=type("Builder", (Builder,), {"module": found}), Runtime=type("Runtime", (Runtime,), {"module": found}),
    )  # fmt: skip
    vars(found).update(contents)
    if lean:
        del found.Builder, found.OnnxParser  # type: ignore[attr-defined]
    return found


@contextmanager
def fake_tensorrt(**versions: str) -> Iterator[dict[str, Any]]:
    """Make these packages the installed ones, as `tensorrt="10.15.1"`, on the fake GPU; yields their modules.

    Polygraphy keeps the package that it was imported for, and so is imported anew.
    """

    def forget_polygraphy() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "polygraphy"]:
            del sys.modules[name]

    made: dict[str, Any] = {name: module(name, version) for name, version in versions.items()}
    with fake.fake_gpu(), pytest.MonkeyPatch.context() as patch:
        for name in ("tensorrt", "tensorrt_lean", "tensorrt_rtx"):
            patch.setitem(sys.modules, name, made.get(name))
        forget_polygraphy()
        try:
            yield made
        finally:
            forget_polygraphy()
