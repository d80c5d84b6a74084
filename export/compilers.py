"""Compiling exported parts for a back end: one function a back end.

A compiler receives the build and returns the manifest's entry of its engines:
{"precision", "profiles", "parts": {part: {"graph", "weights"}}, …}.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.errors import OptionError
from export.part import Target

if TYPE_CHECKING:
    from export.build import Build


def compile_onnxruntime(build: "Build") -> dict[str, Any]:
    """Graphs in fp32: on a CPU half precision costs twice the time. Those of an fp32 build serve as they are.

    ONNX Runtime optimises a graph when it loads it; rows and slots stay dynamic.
    """
    profiles = {"rows": [1, build.capacity.max_length], "slots": [build.capacity.rows, build.capacity.max_length]}
    entry: dict[str, Any] = {"precision": "fp32", "profiles": profiles}
    if build.precision == "fp32":
        return entry | {"parts": {n: {"graph": p["graph"], "weights": p["weights"]} for n, p in build.parts.items()}}
    target = Target(build.root, "engines/onnxruntime", "fp32", build.precision)
    return entry | {"parts": build.write_parts(target)}


COMPILERS: dict[str, Callable[["Build"], dict[str, Any]]] = {"onnxruntime": compile_onnxruntime}


def chosen(backends: list[str]) -> list[str]:
    """The back ends to compile for; raises OptionError for one that has no compiler."""
    names = list(COMPILERS) if backends == ["all"] else backends
    for name in names:
        if name not in COMPILERS:
            raise OptionError(f"no compiler for back end {name!r}; choose from {', '.join(COMPILERS)} or all")
    return names


def compiler_folders(root: Path) -> list[Path]:
    """Folders that compilers write below a bundle."""
    return [root / "engines" / name for name in COMPILERS]
