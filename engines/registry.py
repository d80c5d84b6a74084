"""The back ends by name: what each needs and which options it takes. A back end's module is imported on first use."""

import importlib
import importlib.util
import logging
import os
import platform
import time
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib import metadata
from typing import Any

from engines.bundle import Bundle
from engines.errors import INSTALL, BackendError, DeviceError, OptionError
from engines.model import Model

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CpuOptions:
    """`threads`: CPU threads (None: `engines.cores.default_threads`)."""

    threads: int | None = None

    def __post_init__(self) -> None:
        cores = os.cpu_count() or 1
        if self.threads is not None and not 1 <= self.threads <= cores:
            raise OptionError(f"threads must lie in 1 … {cores} (this machine's cores), got {self.threads}")


@dataclass(frozen=True)
class EagerOptions(CpuOptions):
    """`device`: PyTorch's name of a device (None: the first GPU, else the CPU)."""

    device: str | None = None


@dataclass(frozen=True)
class OnnxRuntimeOptions(CpuOptions):
    """`provider`: "cpu", "cuda", or "auto": CUDA where it is installed and finds a GPU, else the CPU."""

    provider: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threads is not None and self.provider not in ("auto", "cpu"):
            raise OptionError(f"provider {self.provider} takes no threads: it runs on a GPU; leave threads out")


@dataclass(frozen=True)
class TensorRTOptions:
    """`flavour`: the TensorRT package (None: the one that built the engines, or tensorrt_lean of its version where they
    are built for it); `device`: the GPU's number."""

    flavour: str | None = None
    device: int = 0


@dataclass(frozen=True)
class BackEnd:
    """How a back end is found: any of `packages` is needed, `extra` installs one. `compiled`: whether it runs engines
    that were built for it, rather than the bundle's weights. `opener` of `module` takes a bundle and the `options`."""

    module: str
    opener: str
    packages: tuple[str, ...]
    extra: str
    options: type
    compiled: bool = True

    def installed(self) -> bool:
        return any(map(installed, self.packages))

    def unknown(self, options: dict[str, Any]) -> list[str]:
        """Names among `options` that this back end does not take."""
        return sorted(options.keys() - {field.name for field in fields(self.options)})


BACKENDS = {  # the preferred first
    "tensorrt": BackEnd(
        module="engines.trt.model",
        opener="TensorRTModel",
        packages=("tensorrt", "tensorrt_rtx", "tensorrt_lean"),
        extra="gpu",
        options=TensorRTOptions,
    ),
    "onnxruntime": BackEnd(
        module="engines.ort.model",
        opener="open_model",
        packages=("onnxruntime",),
        extra="cpu",
        options=OnnxRuntimeOptions,
    ),
    "eager": BackEnd(
        module="engines.eager.model",
        opener="EagerModel",
        packages=("torch",),
        extra="export",
        options=EagerOptions,
        compiled=False,
    ),
}
REFERENCE = "eager"  # what every other back end is verified against


def available() -> list[str]:
    """Names of the back ends whose packages are installed, the preferred first."""
    return [name for name, back_end in BACKENDS.items() if back_end.installed()]


def installed(package: str) -> bool:
    """Whether a package can be found; it is not imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # an import hook, or a module without a spec, makes it unavailable on purpose
        return False


def accepted(backend: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those of `options` that a back end takes, where several run; all for an unknown one, which `load` refuses."""
    unknown = BACKENDS[backend].unknown(options) if backend in BACKENDS else ()
    return {name: value for name, value in options.items() if name not in unknown}


def versions() -> dict[str, str]:
    """Python's version and those of the installed packages that make or run engines."""
    packages = sorted({"numpy", "onnx", *(package for back_end in BACKENDS.values() for package in back_end.packages)})
    found = {"python": platform.python_version()}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def load(bundle: Bundle, backend: str = "auto", **options: Any) -> Model:
    """Load `bundle` on a back end. An option that is None counts as not given.

    `auto` takes the first back end that is installed, has engines in the bundle,
    takes the options and finds its device; a warning names each that is not used for
    one of the last two reasons. Raises OptionError for an unknown back
    end or an option that it does not take, BackendError where its package is
    missing, DeviceError where its device is, BundleError where a file is damaged or
    the bundle has no engines for it.
    """
    given = {name: value for name, value in options.items() if value is not None}
    return _load_first(bundle, given) if backend == "auto" else load_one(bundle, backend, given)


def _load_first(bundle: Bundle, options: dict[str, Any]) -> Model:
    names = available()
    if not names:
        raise BackendError(f"no back end is installed; {INSTALL.format(extra='cpu')} brings ONNX Runtime")
    ready = [name for name in names if not BACKENDS[name].compiled or name in bundle.manifest.engines]
    usable = [name for name in names if not BACKENDS[name].unknown(options)]
    # The last one is loaded in any case: its error says what to build, or which option to leave out.
    last = ([name for name in ready if name in usable] or usable or names)[-1]
    for name in ready[: ready.index(last)] if last in ready else ():
        if name not in usable:
            unknown = ", ".join(BACKENDS[name].unknown(options))
            logger.warning("not using %s: it takes no option %s", name, unknown)
            continue
        try:
            return load_one(bundle, name, options)
        except DeviceError as error:
            logger.warning("not using %s: %s", name, error)
    return load_one(bundle, last, options)


def load_one(bundle: Bundle, backend: str, options: dict[str, Any]) -> Model:
    """Load `bundle` on the back end of this name; raises as `load` does."""
    if backend not in BACKENDS:
        raise OptionError(f"unknown back end {backend!r}; choose from auto, {', '.join(BACKENDS)}")
    back_end = BACKENDS[backend]
    if unknown := back_end.unknown(options):
        known = ", ".join(field.name for field in fields(back_end.options))
        raise OptionError(
            f"back end {backend} takes no option {', '.join(unknown)} (it takes {known}); leave it out, or choose "
            "another back end"
        )
    chosen = back_end.options(**options)
    install = INSTALL.format(extra=back_end.extra)
    if not back_end.installed():
        needed = " or ".join(back_end.packages)
        raise BackendError(f"back end {backend} needs {needed}, which is not installed; {install}")
    try:
        opener = getattr(importlib.import_module(back_end.module), back_end.opener)
    except ImportError as error:
        raise BackendError(f"back end {backend} does not load ({error}); {install}") from error
    began = time.perf_counter()
    model: Model = opener(bundle, **vars(chosen))
    logger.info("%s on %s: files checked and loaded in %.2f s", backend, model.device, time.perf_counter() - began)
    return model
