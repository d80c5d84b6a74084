"""Decoding of diffusion language models from a bundle. See `load`.

Public names are imported on first use, so that `import runtime` is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

try:
    from engines import __version__, check_siblings
except ImportError as error:  # a file or folder of the user's is called `engines`, too
    raise ImportError(
        f"the package 'engines' of elastic-diffusion is hidden or missing ({error}); rename what hides it, or run "
        "Python from another folder"
    ) from error

check_siblings()

if TYPE_CHECKING:
    from runtime.api import Runtime, load
    from runtime.decoding.events import StepEvent
    from runtime.decoding.generate import Output
    from runtime.decoding.policies import Block, Dual, Elastic, Full, Interval, Prefix, Timesteps

_POLICIES = ("Block", "Dual", "Elastic", "Full", "Interval", "Prefix", "Timesteps")
_MODULES = {
    "Output": "runtime.decoding.generate",
    "Runtime": "runtime.api",
    "StepEvent": "runtime.decoding.controller",
    "load": "runtime.api",
    **dict.fromkeys(_POLICIES, "runtime.decoding.policies"),
}
__all__ = [
    "Block", "Dual", "Elastic", "Full", "Interval", "Output", "Prefix", "Runtime", "StepEvent", "Timesteps",
    "__version__", "load",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
