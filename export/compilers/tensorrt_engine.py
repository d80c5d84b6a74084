"""Builds one TensorRT engine from an ONNX graph with Polygraphy's loaders.

Polygraphy parses the graph, makes the optimization profiles and the builder's
configuration, and builds; this module adds what it lacks:

- The TensorRT package is an option of a build, but Polygraphy reads it from the
  environment when it is imported. `polygraphy_for` imports it for the package,
  and imports it again (0.07 s) where the process used the other one before.
- Compute capabilities are set by `PostprocessConfig`, with TensorRT's own API,
  so that one configuration serves every package. `CreateConfigRTX` is for
  tensorrt_rtx only; its plans have the same sizes.
- Polygraphy's exceptions do not say why a build failed. TensorRT's own message,
  which Polygraphy would print, becomes the reason of our error.

Against calls of TensorRT's own API, the 18 plans of the demo checkpoint take
9.3 s of CPU time instead of 8.9 and 553 MiB instead of 547; plans have the same
sizes, and where TensorRT builds reproducibly the same bytes.
"""

import importlib
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx

from engines.errors import INSTALL, BackendError
from engines.trt.package import LEVELS, VERSION, TensorRTPackage

SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"  # "1": Polygraphy drives tensorrt_rtx, "0": tensorrt
Span = tuple[int, int, int]  # smallest, typical and largest size of a dynamic axis
Spans = dict[str, Span]  # of the axes in one optimization profile


@dataclass(frozen=True)
class Polygraphy:
    """Polygraphy, set up for one TensorRT package: its loaders, its logger and its exception."""

    loaders: Any
    logger: Any
    error: type[Exception]


def polygraphy_for(package: TensorRTPackage) -> Polygraphy:
    """Import Polygraphy for `package`; raises BackendError where it is not installed."""
    rtx = package.name == "tensorrt_rtx"
    os.environ[SWITCH] = str(int(rtx))
    try:
        if rtx != importlib.import_module("polygraphy.config").USE_TENSORRT_RTX:
            for name in [name for name in sys.modules if name.partition(".")[0] == "polygraphy"]:
                del sys.modules[name]
        return Polygraphy(
            loaders=importlib.import_module("polygraphy.backend.trt"),
            logger=importlib.import_module("polygraphy.logger").G_LOGGER,
            error=importlib.import_module("polygraphy.exception").PolygraphyException,
        )
    except ImportError as error:
        raise BackendError(
            f"TensorRT engines are built with Polygraphy, which is missing ({error}); {INSTALL.format(extra='export')}"
        ) from error


def build_engine(
    package: TensorRTPackage,
    name: str,
    model: onnx.ModelProto,
    profiles: Sequence[Spans],
    capabilities: Sequence[str],
    native: Sequence[str] = (),
    compatible: Sequence[str] = (),
) -> tuple[bytes, dict[str, int]]:
    """Build the engine of the graph `model`; returns the plan and the network's number of layers by kind.

    `profiles` are spans of the graph's dynamic axes, `capabilities` the compute
    capabilities of an ahead-of-time build, `compatible` what else the engine is
    for (`LEVELS`, `VERSION`). Raises BackendError where TensorRT cannot parse or
    build the graph, or where it replaced a layer of a kind in `native` by smaller
    ones.
    """
    polygraphy = polygraphy_for(package)
    tool = f"{package.name} {package.version}"
    typed = hasattr(package.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")  # gone where all networks are typed
    with reported(polygraphy, f"{tool} cannot read {name}", "try another version"):
        parsed = polygraphy.loaders.network_from_onnx_bytes(model.SerializeToString(), strongly_typed=typed)
    network = parsed[1]
    kinds = dict(Counter(network.get_layer(i).type.name for i in range(network.num_layers)))
    missing = [kind for kind in native if kind not in kinds]
    if missing:
        raise BackendError(
            f"{tool} has no native {', '.join(missing)} for {name} and uses smaller layers; "
            "the engine would be slow: update TensorRT, or use --backend onnxruntime"
        )

    problem = f"{tool} cannot build {name} for {', '.join([*capabilities, *compatible])}"
    with reported(polygraphy, problem, "choose another --capability, or use --backend onnxruntime"):
        config = configuration(polygraphy, package, model, profiles, capabilities, compatible)
        plan = polygraphy.loaders.engine_bytes_from_network(parsed, config=config)
    return bytes(plan), kinds


def configuration(
    polygraphy: Polygraphy,
    package: TensorRTPackage,
    model: onnx.ModelProto,
    profiles: Sequence[Spans],
    capabilities: Sequence[str],
    compatible: Sequence[str] = (),
) -> Any:
    """Polygraphy's loader of the builder's configuration; the arguments are those of `build_engine`."""

    trt = package.module

    def set_targets(builder: Any, network: Any, config: Any) -> None:
        config.max_aux_streams = 0  # a pass is many small kernels: events between streams cost more than they gain
        if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # of RTX: without it no run can be captured
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if package.ahead_of_time:
            config.num_compute_capabilities = len(capabilities)
            for index, capability in enumerate(capabilities):
                config.set_compute_capability(package.capability(capability), index)
        for kind in compatible:
            if kind in LEVELS:
                config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, LEVELS[kind])
            elif kind == VERSION:
                # A plan with the lean runtime inside has code for the host, and nothing of a bundle may run there.
                config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
                config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)

    config = polygraphy.loaders.CreateConfig(
        profiles=[profile(polygraphy, model, spans) for spans in profiles],
        profiling_verbosity=trt.ProfilingVerbosity.LAYER_NAMES_ONLY,
        tf32=True,  # TensorRT's own default, which Polygraphy would switch off
    )
    return polygraphy.loaders.PostprocessConfig(config, set_targets)


def profile(polygraphy: Polygraphy, model: onnx.ModelProto, spans: Spans) -> Any:
    """The optimization profile in which the axes of the graph's inputs have these spans."""
    made = polygraphy.loaders.Profile()
    for value in model.graph.input:
        axes = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if any(isinstance(axis, str) for axis in axes):
            made.add(value.name, *(tuple(spans[a][i] if isinstance(a, str) else a for a in axes) for i in range(3)))
    return made


class ErrorMessages(logging.Filter):
    """Keeps the messages of a logger instead of letting them through."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno == logging.ERROR:
            self.kept.append(record.getMessage())
        return False


@contextmanager
def reported(polygraphy: Polygraphy, problem: str, remedy: str) -> Iterator[None]:
    """Raise Polygraphy's exceptions as BackendError: the problem, TensorRT's last error message, the remedy."""
    logger, messages = polygraphy.logger, ErrorMessages()
    settings = dict(module_severity=logger.ERROR, use_python_logging_system=True, letter=False, colors=False)
    before = {name: getattr(logger, name) for name in settings}
    for name, value in settings.items():
        setattr(logger, name, value)
    logging.getLogger("Polygraphy").addFilter(messages)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # Polygraphy sets a timing cache, which RTX does not need
            yield
    except polygraphy.error as error:
        message = messages.kept[-1] if messages.kept else str(error)
        reason = " ".join(message.partition(" (See")[0].split())
        raise BackendError(f"{problem}: {reason}; {remedy}") from error
    finally:
        logging.getLogger("Polygraphy").removeFilter(messages)
        for name, value in before.items():
            setattr(logger, name, value)
