"""The two TensorRT packages, which have one API: `tensorrt`, and `tensorrt_rtx` for consumer GPUs.

`tensorrt` compiles for the GPU that it runs on. `tensorrt_rtx` compiles ahead of time for named compute
capabilities, on a machine without a GPU, and finishes the kernels on the machine that runs the engine.
"""

import importlib
from dataclasses import dataclass
from typing import Any

from engines.errors import INSTALL, BackendError, OptionError

CURRENT = "current"  # the compute capability of the GPU of this machine
FLAVOURS = {"tensorrt": "gpu", "tensorrt_rtx": "rtx"}  # values of --flavour: package -> extra; preferred first


@dataclass(frozen=True)
class TensorRTPackage:
    """An installed TensorRT package: its name, module and version."""

    name: str
    module: Any
    version: str

    @property
    def ahead_of_time(self) -> bool:
        """Whether it compiles for named compute capabilities, without a GPU."""
        return hasattr(self.module, "ComputeCapability")

    def capability(self, name: str) -> Any:
        """The package's constant for a compute capability such as "8.9", or "current".

        Raises OptionError if the package cannot compile for it.
        """
        member = getattr(
            self.module.ComputeCapability, "CURRENT" if name == CURRENT else f"SM{name.replace('.', '')}", None
        )
        if member is None:
            known = ", ".join([*self.capabilities(), CURRENT])
            raise OptionError(f"{self.name} {self.version} has no compute capability {name!r}; choose from {known}")
        return member

    def capabilities(self) -> list[str]:
        """The compute capabilities that it compiles for by name."""
        members = self.module.ComputeCapability.__members__
        return [f"{name[2:-1]}.{name[-1]}" for name in members if name.startswith("SM")]


def find(name: str | None = None) -> TensorRTPackage:
    """The TensorRT package `name`, or the first that is installed.

    Raises OptionError for an unknown name, BackendError if it is not installed.
    """
    if name is not None and name not in FLAVOURS:
        raise OptionError(f"unknown TensorRT package {name!r}; choose from {', '.join(FLAVOURS)}")
    reasons = []
    for candidate in [name] if name else FLAVOURS:
        try:
            module = importlib.import_module(candidate)
            return TensorRTPackage(candidate, module, module.__version__)
        except (ImportError, OSError, AttributeError) as error:  # a wheel without its libraries fails in many ways
            reasons.append(f"{candidate}: {error}")
    extra = FLAVOURS[name] if name else "rtx"
    raise BackendError(f"TensorRT is not installed ({'; '.join(reasons)}); {INSTALL.format(extra=extra)}")
