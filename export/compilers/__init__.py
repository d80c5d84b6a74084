"""Compiling exported parts for a back end: one function a back end.

A compiler receives the build and returns the manifest's entry of its engines:
{"precision", "profiles", "parts": {part: {"graph", "weights"}}, …}.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.errors import INSTALL, BackendError, OptionError
from engines.registry import installed
from engines.signatures.cpu import cpu_signatures
from engines.signatures.vision import vision_signatures
from engines.weights import SIZES

if TYPE_CHECKING:
    from export.build import BuildJob


def compile_onnxruntime(build: "BuildJob") -> dict[str, Any]:
    """The unfused graphs, and those of vision, in fp32: on a CPU half precision costs twice the time.

    The weights of an fp32 build serve as they are. ONNX Runtime optimises a
    graph when it loads it; rows and slots stay dynamic. All parts in one graph
    are a second copy of their weights in memory: small models get it, whose
    steps the calls would else take a good part of.
    """
    from export.part import Target

    profiles = {"rows": [1, build.capacity.max_length], "slots": [1, build.capacity.max_length]}
    folder = "onnx" if build.precision == "fp32" and build.weights is None else "engines/onnxruntime"
    target = Target(build.root, folder, "fp32", build.precision, build.weights)
    c = build.config
    small = 4 * (c.layers * c.layer_numbers + 2 * c.vocab * c.d_model) <= FEW_BYTES
    signatures = (
        *cpu_signatures(build.config, small and build.weights is None),
        *vision_signatures(build.config, "fp32"),
    )
    parts = build.write_parts(target, signatures)
    return {"precision": "fp32", "weights": build.weights, "profiles": profiles, "parts": parts}


def compile_tensorrt(build: "BuildJob") -> dict[str, Any]:
    """Plans for NVIDIA GPUs; what they need is imported when they are asked for."""
    from export.compilers import tensorrt

    return tensorrt.compile_plans(build)


DEFAULT = "onnxruntime"
FEW_BYTES = 1 << 27  # of weights
WEIGHTS = {"int8": 8, "int4": 4}  # bits
COMPILERS: dict[str, Callable[["BuildJob"], dict[str, Any]]] = {
    "onnxruntime": compile_onnxruntime,
    "tensorrt": compile_tensorrt,
}


def engine_bytes(
    names: list[str], precision: str, weights: str | None, table: int, numbers: int, whole: int = 0
) -> int:  # fmt: skip
    """Bytes that engines take beside the exported parts.

    `numbers` of the language model's weights lie in all, `table` of them in one
    matrix, and `whole` more in parts that are never quantised.
    """
    if weights is not None:  # a block of 32 has a scale in fp32 and a zero point besides
        quantised = int((numbers - table) * (WEIGHTS[weights] / 8 * 33 / 32 + 4 / 32))
        return table * SIZES[precision] + quantised + whole * SIZES["fp32"]
    copied = "onnxruntime" in names and precision != "fp32"
    return table * SIZES[precision] + (numbers - table + whole) * SIZES["fp32"] if copied else 0


def chosen(backends: list[str] | None) -> list[str]:
    """The back ends to compile for (None: the default); raises OptionError for one that has no compiler."""
    if backends is None:
        return [DEFAULT]
    names = list(COMPILERS) if backends == ["all"] else list(dict.fromkeys(backends))
    for name in names:
        if name not in COMPILERS:
            raise OptionError(f"no compiler for back end {name!r}; choose from {', '.join(COMPILERS)} or all")
    return names


def check_options(
    names: list[str], precision: str, weights: str | None, flavour: str | None, capabilities: list[str] | None
) -> None:
    """Raises OptionError or BackendError for what a compiler cannot do, before anything is written."""
    if weights is not None and weights not in WEIGHTS:
        raise OptionError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}; leave it out for whole ones")
    if weights is not None and "onnxruntime" not in names:
        raise OptionError("--weights is ONNX Runtime's: add --backend onnxruntime, or leave it out")
    if weights is not None and not installed("onnxruntime"):
        raise BackendError(f"--weights needs ONNX Runtime's quantizer; {INSTALL.format(extra='cpu')} brings it")
    if "tensorrt" not in names:
        if flavour or capabilities:
            raise OptionError("--flavour and --capability are TensorRT's: add --backend tensorrt, or leave them out")
        return
    from engines.trt.package import find
    from export.compilers import tensorrt

    tensorrt.check_precision(precision)
    tensorrt.targets(find(flavour), capabilities)


def compiler_folders(root: Path) -> list[Path]:
    """Folders that compilers write below a bundle."""
    return [root / "engines" / name for name in COMPILERS]
