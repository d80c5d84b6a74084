"""The shared bottom of `export` and `runtime`: what a bundle is, and the back ends that run its parts.

`__version__` is the version of the whole project; pyproject.toml reads it here.
"""

import importlib.util
import os

__version__ = "0.1.0"


def check_siblings() -> None:
    """Raise ImportError if another top-level `export` or `runtime` hides this project's.

    A file of that name in the working folder does; it is found here without being imported.
    """
    root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    for name in ("export", "runtime"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # not installed, or a folder without __init__.py
            continue
        if os.path.realpath(spec.origin) != os.path.join(root, name, "__init__.py"):
            raise ImportError(
                f"{spec.origin} hides the package {name!r} of elastic-diffusion in {root}; rename that file or "
                "folder, or run Python from another folder"
            )
