"""Finding and loading back ends: each is one module, imported when it is asked for."""

import importlib
import importlib.util
from typing import Any

from engines.bundle import Bundle
from engines.errors import INSTALL, BackendError, OptionError
from engines.session import Model

# Back end -> (module, class, package it needs, extra that installs it), the preferred first.
BACKENDS = {
    "onnxruntime": ("engines.onnxruntime", "OnnxRuntimeModel", "onnxruntime", "cpu"),
    "eager": ("engines.eager", "EagerModel", "torch", "export"),
}
REFERENCE = "eager"  # what every other is verified against; runs on the weights, and needs no engines


def available() -> list[str]:
    """Back ends whose packages are installed."""
    return [name for name, (_, _, package, _) in BACKENDS.items() if installed(package)]


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # something makes the package unavailable on purpose
        return False


def load(bundle: Bundle, backend: str = "auto", **options: Any) -> Model:
    """Load `bundle` on a back end; `auto` takes the first that is installed and built.

    Raises OptionError for an unknown name, BackendError where the package is
    missing, BundleError where a file is damaged or the bundle has no such engines.
    """
    if backend == "auto":
        candidates = available()
        if not candidates:
            raise BackendError(f"no back end is installed; {INSTALL.format(extra='cpu')} brings ONNX Runtime")
        usable = (name for name in candidates if name == REFERENCE or name in bundle.manifest.engines)
        backend = next(usable, candidates[0])  # where none is built, the first says how to build it
    if backend not in BACKENDS:
        raise OptionError(f"unknown back end {backend!r}; choose from auto, {', '.join(BACKENDS)}")
    threads = options.get("threads")
    if threads is not None and threads < 1:
        raise OptionError(f"threads must be at least 1, got {threads}")
    module, name, package, extra = BACKENDS[backend]
    if not installed(package):
        raise BackendError(f"back end {backend} needs {package}, which is not installed; {INSTALL.format(extra=extra)}")
    try:
        cls = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise BackendError(f"back end {backend} does not load ({error}); {INSTALL.format(extra=extra)}") from error
    bundle.check()
    model: Model = cls(bundle, **options)
    return model
