"""Finding and loading back ends: each is one module, imported when it is asked for."""

import importlib
import importlib.util
import os
import platform
from contextlib import suppress
from importlib import metadata
from typing import Any

from engines.bundle import Bundle
from engines.errors import INSTALL, BackendError, DeviceError, OptionError
from engines.model import Model

# Back end -> (module, what opens a bundle, packages any of which it needs, extra that installs it), preferred first.
BACKENDS = {
    "tensorrt": ("engines.trt.model", "TensorRTModel", ("tensorrt", "tensorrt_rtx"), "gpu"),
    "onnxruntime": ("engines.ort.model", "open_model", ("onnxruntime",), "cpu"),
    "eager": ("engines.eager.model", "EagerModel", ("torch",), "export"),
}
REFERENCE = "eager"  # what every other is verified against; runs on the weights, and needs no engines


def available() -> list[str]:
    """Back ends whose packages are installed."""
    return [name for name, (_, _, packages, _) in BACKENDS.items() if any(map(installed, packages))]


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # something makes the package unavailable on purpose
        return False


def versions() -> dict[str, str]:
    """Python's version and those of the installed packages that make or run engines."""
    packages = sorted({"numpy", "onnx", *(p for _, _, packages, _ in BACKENDS.values() for p in packages)})
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def load(bundle: Bundle, backend: str = "auto", **options: Any) -> Model:
    """Load `bundle` on a back end; `auto` takes the first that is installed and built and finds its device.

    The model's `note` says which was passed over. Raises OptionError for an
    unknown name, BackendError where the package is missing, DeviceError where
    the device is, BundleError where a file is damaged or the bundle has no such
    engines.
    """
    if options.get("provider") is None:
        options.pop("provider", None)
    elif backend in ("auto", "onnxruntime"):
        backend = "onnxruntime"
    else:
        raise OptionError(f"a provider is ONNX Runtime's and {backend} has none; leave --provider out")
    if backend != "auto":
        return load_one(bundle, backend, **options)
    candidates = available()
    if not candidates:
        raise BackendError(f"no back end is installed; {INSTALL.format(extra='cpu')} brings ONNX Runtime")
    built = [name for name in candidates if name == REFERENCE or name in bundle.manifest.engines]
    fallback = next((name for name in candidates if name != "tensorrt"), candidates[0])
    notes = []
    names = built or [fallback]  # where none is built, loading it says how to build it
    for name in names:
        try:
            model = load_one(bundle, name, **options)
        except DeviceError as error:
            if name == names[-1]:
                raise
            notes.append(f"{name} is passed over: {error}")
        else:
            model.note = "; ".join([*notes, model.note] if model.note else notes)
            return model
    raise AssertionError("the last candidate loads or raises")


def load_one(bundle: Bundle, backend: str, **options: Any) -> Model:
    if backend not in BACKENDS:
        raise OptionError(f"unknown back end {backend!r}; choose from auto, {', '.join(BACKENDS)}")
    threads = options.get("threads")
    cores = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= cores:
        raise OptionError(f"threads must lie in 1 … {cores} (this machine's cores), got {threads}")
    module, name, packages, extra = BACKENDS[backend]
    if not any(map(installed, packages)):
        needed = " or ".join(packages)
        raise BackendError(f"back end {backend} needs {needed}, which is not installed; {INSTALL.format(extra=extra)}")
    try:
        opener = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise BackendError(f"back end {backend} does not load ({error}); {INSTALL.format(extra=extra)}") from error
    bundle.check()
    model: Model = opener(bundle, **options)
    return model
