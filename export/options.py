"""The options of a build, written down once.

The fields of `BuildOptions` are the keywords of `export.build`, and their
metadata is what the command line's arguments are made from (`add_arguments`).
"""

import argparse
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from engines.config import PRECISIONS
from engines.errors import OptionError
from engines.registry import BACKENDS, REFERENCE
from engines.trt.package import FLAVOURS, LEVELS, VERSION

COMPILED = tuple(sorted(name for name in BACKENDS if name != REFERENCE))  # back ends that need compiled engines
WEIGHTS = {"int8": 8, "int4": 4}  # name -> bits of a quantised weight
MAX_BATCH = 1024
Progress = Callable[[str, int, int], None]  # (what is being made, its number from 1, how many there are)


def option(help: str, flag: str = "", backend: str | None = None, **argument: Any) -> dict[str, Any]:
    """A field's metadata: its command-line argument `flag` (by default the field's name) and argparse's keywords.

    An option with a `backend` has a meaning for the engines of this back end alone.
    """
    return {"help": help, "flag": flag, "backend": backend, "argument": argument}


@dataclass(frozen=True)
class BuildOptions:
    """What to build, from which checkpoint and where to.

    None stands for the default that its help names. `progress` is called before
    each part is written. Ranges that depend on the checkpoint are checked when
    the build is planned (`export.build.plan`).
    """

    checkpoint: str | Path = field(
        default="demo", metadata=option("Hugging Face directory, or demo (default), sudoku, vote")
    )
    out: str | Path | None = field(
        default=None, metadata=option("the bundle's folder (default: bundles/<name of the checkpoint>)", type=Path)
    )
    precision: str = field(
        default="fp32", metadata=option("element type of the exported graphs (default fp32)", choices=PRECISIONS)
    )
    backends: list[str] | None = field(
        default=None,
        metadata=option(
            "compile for this back end (repeatable; none: export only; default onnxruntime)",
            "--backend",
            action="append",
            choices=[*COMPILED, "all", "none"],
        ),
    )
    max_length: int | None = field(
        default=None, metadata=option("positions of prompt and answer (default: the checkpoint's)", type=int)
    )
    window: int | None = field(
        default=None, metadata=option("largest window at run time (default: the checkpoint's own, or 16)", type=int)
    )
    track_num: int = field(default=1, metadata=option("largest track_num at run time (default 1)", type=int))
    max_batch: int = field(default=16, metadata=option("most sequences decoded side by side (default 16)", type=int))
    mask_id: int | None = field(
        default=None,
        metadata=option("id of the mask, where the checkpoint does not name it (default: its family's)", type=int),
    )
    eos_id: int | None = field(
        default=None,
        metadata=option("id of EOS, where the checkpoint does not name it (default: its family's)", type=int),
    )
    flavour: str | None = field(
        default=None,
        metadata=option("TensorRT package (default: the first installed)", backend="tensorrt", choices=list(FLAVOURS)),
    )
    capabilities: list[str] | None = field(
        default=None,
        metadata=option(
            "compute capability to build TensorRT engines for (repeatable)",
            "--capability",
            "tensorrt",
            action="append",
            metavar="N.N",
        ),
    )
    compatible: list[str] | None = field(
        default=None,
        metadata=option(
            "build engines of tensorrt that also run on GPUs of the same compute capability, on Ampere and later ones, "
            "or on tensorrt-lean of the same version (repeatable)",
            backend="tensorrt",
            action="append",
            choices=[*LEVELS, VERSION],
        ),
    )
    weights: str | None = field(
        default=None,
        metadata=option(
            "quantise the matrices of ONNX Runtime's engines (default: do not)",
            backend="onnxruntime",
            choices=list(WEIGHTS),
        ),
    )
    force: bool = field(
        default=False,
        metadata=option("replace the bundle in --out, or build among other files", action="store_true"),
    )
    progress: Progress = field(default=lambda *_: None, repr=False, compare=False)

    def check(self) -> None:
        """Raise OptionError for a value that is wrong for every checkpoint; the back ends must have been chosen."""
        if self.precision not in PRECISIONS:
            raise OptionError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.weights not in (None, *WEIGHTS):
            raise OptionError(
                f"weights must be one of {', '.join(WEIGHTS)}, got {self.weights!r}; leave it out to keep the precision"
            )
        for one in fields(self):
            backend = one.metadata.get("backend")
            if getattr(self, one.name) and backend and backend not in (self.backends or ()):
                raise OptionError(
                    f"{flag(one)} is an option of back end {backend}: add --backend {backend}, or leave {flag(one)} out"
                )


def flag(one: Field[Any]) -> str:
    """The command-line flag of a field."""
    return str(one.metadata["flag"] or f"--{one.name.replace('_', '-')}")


def engine_options() -> list[str]:
    """The options that engines are compiled with, and that their entry in the manifest records."""
    return [one.name for one in fields(BuildOptions) if one.metadata.get("backend")]


def arguments(options: BuildOptions) -> tuple[str, ...]:
    """The arguments that give `options` on the command line, but checkpoint, folder and --force; defaults left out."""
    found: list[str] = []
    for one in fields(options):
        value = getattr(options, one.name)
        if one.name in ("checkpoint", "out", "force", "progress") or value == one.default:
            continue
        if one.name == "precision":
            found.append(f"--{value}")
        else:
            for each in (value or ["none"]) if isinstance(value, list) else [value]:
                found += [flag(one), str(each)]
    return tuple(found)


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
        parser.add_argument(flag(one), dest=one.name, default=one.default, help=one.metadata["help"], **argument)


def from_arguments(args: argparse.Namespace, progress: Progress) -> BuildOptions:
    """The options that a parser with `add_arguments` has read."""
    values = {one.name: getattr(args, one.name) for one in fields(BuildOptions) if "argument" in one.metadata}
    if values["backends"] == ["none"]:
        values["backends"] = []
    return BuildOptions(**values, progress=progress)
