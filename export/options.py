"""The options of a build, written down once.

The fields of `BuildOptions` are the keywords of `export.build`, and their
metadata is what the command line's arguments are made from (`add_arguments`).
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from engines.config import PRECISIONS
from engines.errors import OptionError
from engines.registry import BACKENDS, REFERENCE
from engines.trt.package import FLAVOURS

COMPILED = tuple(sorted(name for name in BACKENDS if name != REFERENCE))  # back ends that need compiled engines
WEIGHTS = {"int8": 8, "int4": 4}  # name -> bits of a quantised weight
MAX_BATCH = 1024
Progress = Callable[[str, int, int], None]  # (what is being made, its number from 1, how many there are)


def option(default: Any, help: str, flag: str = "", **argument: Any) -> Any:
    """A field with its command-line argument: `flag` (by default the field's name) and argparse's keywords."""
    return field(default=default, metadata={"help": help, "flag": flag, "argument": argument})


@dataclass(frozen=True)
class BuildOptions:
    """What to build, from which checkpoint and where to.

    None stands for the default that its help names. `progress` is called before
    each part is written. Ranges that depend on the checkpoint are checked when
    the build is planned (`export.build.plan`).
    """

    checkpoint: str | Path = option("demo", "Hugging Face directory, or 'demo' (default)")
    out: str | Path | None = option(None, "the bundle's folder (default: bundles/<name of the checkpoint>)", type=Path)
    precision: str = option("fp32", "element type of the exported graphs (default fp32)", choices=PRECISIONS)
    backends: list[str] | None = option(
        None, "compile for this back end (repeatable; none: export only; default onnxruntime)", "--backend",
        action="append", choices=[*COMPILED, "all", "none"],
    )  # fmt: skip
    max_length: int | None = option(None, "positions of prompt and answer (default: the checkpoint's)", type=int)
    window: int | None = option(None, "largest window at run time (default: the checkpoint's own, or 16)", type=int)
    track_num: int = option(1, "largest track_num at run time (default 1)", type=int)
    max_batch: int = option(16, "most sequences decoded side by side (default 16)", type=int)
    flavour: str | None = option(None, "TensorRT package (default: the first installed)", choices=list(FLAVOURS))
    capabilities: list[str] | None = option(
        None, "compute capability to build TensorRT engines for (repeatable)", "--capability",
        action="append", metavar="N.N",
    )  # fmt: skip
    weights: str | None = option(None, "quantise ONNX Runtime's matrices (default: do not)", choices=list(WEIGHTS))
    force: bool = option(False, "replace the bundle in --out, or build among other files", action="store_true")
    progress: Progress = field(default=lambda *_: None, repr=False, compare=False)

    def check(self) -> None:
        """Raise OptionError for a value that no checkpoint allows."""
        for name, allowed in (("precision", PRECISIONS), ("weights", (None, *WEIGHTS))):
            if getattr(self, name) not in allowed:
                listed = ", ".join(filter(None, allowed))
                unset = "; leave it out for whole weights" if None in allowed else ""
                raise OptionError(f"{name} must be one of {listed}, got {getattr(self, name)!r}{unset}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add an argument for each option to `parser`; a precision is a flag of its own (--fp16)."""
    for one in fields(BuildOptions):
        if "argument" not in one.metadata:
            continue
        argument = dict(one.metadata["argument"])
        if one.name == "precision":
            group = parser.add_mutually_exclusive_group()
            for name in argument["choices"]:
                group.add_argument(f"--{name}", dest=one.name, action="store_const", const=name,
                                   help=f"{name} as {one.metadata['help']}")  # fmt: skip
            parser.set_defaults(precision=one.default)
            continue
        flag = one.metadata["flag"] or f"--{one.name.replace('_', '-')}"
        parser.add_argument(flag, dest=one.name, default=one.default, help=one.metadata["help"], **argument)


def from_arguments(args: argparse.Namespace, progress: Progress) -> BuildOptions:
    """The options that a parser with `add_arguments` has read."""
    values = {one.name: getattr(args, one.name) for one in fields(BuildOptions) if "argument" in one.metadata}
    if values["backends"] == ["none"]:
        values["backends"] = []
    return BuildOptions(**values, progress=progress)
