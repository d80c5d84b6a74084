"""Finding and loading back ends: each is one module, imported when it is asked for."""

import importlib
import importlib.util
from typing import Any

from engines.bundle import Bundle
from engines.errors import BackendError, OptionError
from engines.session import Model

# Back end -> (module, class, package it needs, extra that installs it), the preferred first.
BACKENDS = {
    "onnxruntime": ("engines.onnxruntime", "OnnxRuntimeModel", "onnxruntime", "cpu"),
    "eager": ("engines.eager", "EagerModel", "torch", "export"),
}
INSTALL = "pip install 'elastic-diffusion[{extra}]'"


def available() -> list[str]:
    """Back ends whose packages are installed."""
    return [name for name, (_, _, package, _) in BACKENDS.items() if importlib.util.find_spec(package)]


def load(bundle: Bundle, backend: str = "auto", **options: Any) -> Model:
    """Load `bundle` on a back end; `auto` takes the first that is installed and built.

    Raises OptionError for an unknown name, BackendError where the package is
    missing, BundleError where the bundle has no such engines.
    """
    if backend == "auto":
        usable = [name for name in available() if name == "eager" or name in bundle.manifest.engines]
        if not usable:
            raise BackendError(f"no back end is installed; {INSTALL.format(extra='cpu')} brings ONNX Runtime")
        backend = usable[0]
    if backend not in BACKENDS:
        raise OptionError(f"unknown back end {backend!r}; choose from auto, {', '.join(BACKENDS)}")
    module, name, package, extra = BACKENDS[backend]
    if not importlib.util.find_spec(package):
        raise BackendError(f"back end {backend} needs {package}, which is not installed; {INSTALL.format(extra=extra)}")
    model: Model = getattr(importlib.import_module(module), name)(bundle, **options)
    return model
