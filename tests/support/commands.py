"""Command lines in tests: run in this process or in one of their own, and how they fail."""

import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from engines.entry import INTERRUPTED
from tests.support.cases import ROOT, sentence

Result = tuple[int, str, str]
Call = Callable[..., Result]


def failed(result: Result, code: int, *words: str) -> None:
    """One sentence on standard error, nothing on standard output, and the exit code."""
    assert result[0] == code, result
    assert result[1] == "" and result[2].startswith("error: ") and result[2].count("\n") == 1, result
    sentence(result[2], *words)


def process(*argv: object, **options: Any) -> "subprocess.Popen[str]":
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": ROOT, **options}
    return subprocess.Popen([sys.executable, "-m", *map(str, argv)], text=True, **options)


def interrupted(child: "subprocess.Popen[str]", *words: str) -> None:
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=240)
    assert child.returncode == INTERRUPTED, err
    sentence(err, "interrupted", *words)
