"""Decoding of diffusion language models from a bundle. See `load`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.api import Runtime, load
    from runtime.controller import StepEvent
    from runtime.generate import Output

__all__ = ["Output", "Runtime", "StepEvent", "load"]
HOMES = {"Output": "generate", "Runtime": "api", "StepEvent": "controller", "load": "api"}


def __getattr__(name: str) -> Any:
    """Import on first use, so that a command line answers Ctrl-C and `--help` at once."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"runtime.{HOMES[name]}"), name)
