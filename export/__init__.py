"""From a checkpoint to a bundle. See `build`.

`build` is imported on first use, so that `import export` is fast.
"""

import importlib
import sys
from types import ModuleType
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
    from export.build import build

__all__ = ["__version__", "build"]


class _Package(ModuleType):
    """The package, whose attribute `build` is the function and never the module `export.build`."""

    @property
    def build(self) -> Any:
        return importlib.import_module("export.build").build

    @build.setter
    def build(self, module: ModuleType) -> None:
        """Ignore the module: Python sets each imported submodule as an attribute of its package."""


def __dir__() -> list[str]:
    return __all__


sys.modules[__name__].__class__ = _Package
