"""The TensorRT packages, which have one API: `tensorrt`, and `tensorrt_rtx` for consumer GPUs.

`tensorrt` compiles for the GPU that it runs on. `tensorrt_rtx` compiles ahead of time for named compute
capabilities, on a machine without a GPU, and finishes the kernels on the machine that runs the engine.
`tensorrt_lean` runs engines of `tensorrt` that are built for it, and builds none.
"""

import importlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from engines.errors import INSTALL, BackendError, OptionError

CURRENT = "current"  # the compute capability of the GPU of this machine
FLAVOURS = {"tensorrt": "gpu", "tensorrt_rtx": "rtx"}  # values of --flavour: package -> extra; preferred first
LEAN = "tensorrt_lean"
OLDEST = {"tensorrt": "10.15.1", LEAN: "10.15.1"}  # the first with native rotary embedding and cache update
VERSION = "version"  # of `--compatible`: the engine runs on LEAN
LEVELS = {"capability": "SAME_COMPUTE_CAPABILITY", "ampere": "AMPERE_PLUS"}  # of `--compatible`: GPUs it runs on


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

    @property
    def too_old(self) -> bool:
        """Whether it lacks layers that the engines are made of."""
        return self.name in OLDEST and numbers(self.version) < numbers(OLDEST[self.name])

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
    return installed([name] if name else FLAVOURS, FLAVOURS[name] if name else "rtx")[0]


def installed(names: Iterable[str], extra: str) -> list[TensorRTPackage]:
    """Those of the packages that are installed; raises BackendError if none is, with the `extra` that brings one."""
    found, reasons = [], []
    for name in names:
        try:
            module = importlib.import_module(name)
            found.append(TensorRTPackage(name, module, module.__version__))
        except (ImportError, OSError, AttributeError) as error:  # a wheel without its libraries fails in many ways
            reasons.append(f"{name}: {error}")
    if not found:
        raise BackendError(f"TensorRT is not installed ({'; '.join(reasons)}); {INSTALL.format(extra=extra)}")
    return found


def numbers(version: str) -> tuple[int, ...]:
    """ "10.15.1.29" -> (10, 15, 1, 29)."""
    return tuple(map(int, re.findall(r"\d+", version)))
