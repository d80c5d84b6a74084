"""What a bundle was built from: its checkpoint and the arguments of the build, and the command that builds it again."""

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from engines.files import signed

RECORD = "stamps/build.json"
NEXT = "next"  # the folder in a bundle's own that a build writes to, until its manifest makes it the bundle
SIZES = "--max-length", "--window", "--track-num", "--max-batch"  # options that set the capacity of a bundle
PRECISIONS = "--fp32", "--fp16", "--bf16"
FLAVOURED = "--flavour", "--capability", "--compatible"  # options that one package of TensorRT takes
SHIPPED = "demo", "sudoku", "vote"  # stand for the checkpoints that ship with `export`; the first is the default


@dataclass(frozen=True)
class Record:
    """What a bundle was built from.

    `checkpoint` is an absolute path or a name of `SHIPPED`, `arguments` those of `python -m export build` beside it
    and --out, `length` the most positions that the checkpoint allows.
    """

    checkpoint: str
    arguments: tuple[str, ...]
    length: int

    def content(self) -> bytes:
        """The bytes of the record's file."""
        return signed({"checkpoint": self.checkpoint, "arguments": list(self.arguments), "length": self.length})

    def command(self, root: Path, *more: str) -> str | None:
        """The command that builds this bundle at `root`; None where the checkpoint is gone.

        `more` arguments replace those they contradict: the same option, another precision, or another package.
        """
        if self.checkpoint not in SHIPPED and not os.path.isdir(self.checkpoint):
            return None
        arguments = list(self.arguments)
        if "--backend" in more and "none" in arguments:  # which is no back end beside another
            at = arguments.index("none")
            del arguments[at - 1 : at + 1]
        replaced = set(more) & set(SIZES) | (set(FLAVOURED) if "--flavour" in more else set())
        for at in reversed([at for at, argument in enumerate(arguments) if argument in replaced]):
            del arguments[at : at + 2]
        if set(more) & set(PRECISIONS):
            arguments = [argument for argument in arguments if argument not in PRECISIONS]
        source = () if self.checkpoint == SHIPPED[0] else ("--checkpoint", self.checkpoint)
        return shlex.join(["python", "-m", "export", "build", *source, *arguments, *more, "--out", str(root)])


def read_record(folder: Path) -> Record | None:
    """The record below `folder`; None where there is none, or it is not as a build wrote it."""
    try:
        raw = (folder / RECORD).read_bytes()
        content = json.loads(raw)
        record = Record(content["checkpoint"], tuple(content["arguments"]), content["length"])
        return record if record.content() == raw else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def enlarge(root: Path, flag: str, size: int, folder: str = ".") -> str:
    """The end of a remedy that ends with another: the command that builds the bundle at `root` for a larger size.

    "" where the checkpoint allows no such size, or is not known.
    """
    record = read_record(root / folder)
    if record is None or flag not in SIZES or (flag != "--max-batch" and size > record.length):
        return ""
    command = record.command(root, flag, str(size), "--force")
    return f", or build it again with `{command}`" if command else ""


def rebuild(root: Path, *more: str, folder: str = ".") -> str:
    """The remedy where the bundle at `root` cannot be used: the command that builds it, where it is known.

    `more` are arguments beside those it was built with, `folder` is where below `root` its files lie.
    """
    record = read_record(root / folder) or read_record(root / NEXT)
    command = record.command(root, *more) if record else None
    if command:
        return f"build it again with `{command}`"
    return "build it again from its checkpoint"
