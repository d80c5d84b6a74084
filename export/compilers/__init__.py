"""Compilers: each turns exported parts into the engines of one back end.

A compiler is a module of this package with a `COMPILER`; it is imported when a
build names it. To add one, add a module here and its name to `COMPILERS`.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.errors import OptionError
from export.job import BuildJob
from export.options import BuildOptions

if TYPE_CHECKING:
    from export.part import Target

COMPILERS = ("onnxruntime", "tensorrt")  # the first is the default


class Compiler(ABC):
    """Compiles exported parts for one back end."""

    name: str

    @abstractmethod
    def check(self, options: BuildOptions) -> None:
        """Raise OptionError or BackendError for options that this compiler cannot build, before anything is written."""

    def engine_bytes(self, job: BuildJob) -> int:
        """Bytes that the engines take, about, beside the parts of `targets`."""
        return 0

    def targets(self, job: BuildJob) -> "Sequence[Target]":
        """Weights that this compiler needs beside the exported ones; they are written from the same read."""
        return ()

    @abstractmethod
    def compile(self, job: BuildJob) -> dict[str, Any]:
        """Write the engines; returns the manifest's entry {"precision", "profiles", "parts": {part: …}, …}.

        Adds every file it writes to `job.files`. Raises BackendError where the compiler fails.
        """


def compiler(name: str) -> Compiler:
    """The compiler of the back end `name`, one of COMPILERS."""
    found: Compiler = importlib.import_module(f"{__name__}.{name}").COMPILER
    return found


def chosen(backends: list[str] | None) -> list[str]:
    """The back ends to compile for (None: the default); raises OptionError for one that has no compiler."""
    if backends is None:
        return [COMPILERS[0]]
    names = list(COMPILERS) if backends == ["all"] else list(dict.fromkeys(backends))
    for name in names:
        if name not in COMPILERS:
            raise OptionError(f"no compiler for back end {name!r}; choose from {', '.join(COMPILERS)} or all")
    return names


def folders(root: Path) -> list[Path]:
    """The folders that compilers write below the bundle `root`."""
    return [root / "engines" / name for name in COMPILERS]
