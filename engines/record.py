"""What a bundle was built from: its checkpoint and the arguments of the build, and the command that builds it again."""

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from engines.files import signed

RECORD = "stamps/build.json"
NEXT = "next"  # the folder in a bundle's own that a build writes to, until its manifest makes it the bundle
SHIPPED = "demo"  # stands for the checkpoint that ships with `export`


@dataclass(frozen=True)
class Record:
    """`checkpoint` is an absolute path or "demo", `arguments` those of `python -m export build` beside it and --out."""

    checkpoint: str
    arguments: tuple[str, ...]

    def content(self) -> bytes:
        """The bytes of the record's file."""
        return signed({"checkpoint": self.checkpoint, "arguments": list(self.arguments)})

    def command(self, root: Path, *more: str) -> str | None:
        """The command that builds this bundle at `root`, with `more` arguments; None where the checkpoint is gone."""
        if self.checkpoint != SHIPPED and not os.path.isdir(self.checkpoint):
            return None
        arguments = list(self.arguments)
        if "--backend" in more and "none" in arguments:  # which is no back end beside another
            at = arguments.index("none")
            del arguments[at - 1 : at + 1]
        source = () if self.checkpoint == SHIPPED else ("--checkpoint", self.checkpoint)
        return shlex.join(["python", "-m", "export", "build", *source, *arguments, *more, "--out", str(root)])


def read_record(folder: Path) -> Record | None:
    """The record below `folder`; None where there is none, or it is not as a build wrote it."""
    try:
        raw = (folder / RECORD).read_bytes()
        content = json.loads(raw)
        record = Record(content["checkpoint"], tuple(content["arguments"]))
        return record if record.content() == raw else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def rebuild(root: Path, *more: str, folder: str = ".") -> str:
    """The remedy where the bundle at `root` cannot be used: the command that builds it, where it is known.

    `more` are arguments beside those it was built with, `folder` is where below `root` its files lie.
    """
    record = read_record(root / folder) or read_record(root / NEXT)
    command = record.command(root, *more) if record else None
    if command:
        return f"build it again with `{command}`"
    return "build it again from its checkpoint"
