"""What both command lines share: errors as one sentence, and quiet ends."""

import argparse
import importlib
import io
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from rich.console import Console

from engines import interrupt
from engines.errors import ElasticError
from engines.interrupt import INTERRUPTED


def screen() -> Console:
    """Where people read: the terminal as wide as it is, a file or a pipe wide enough for tables."""
    terminal = sys.stdout is not None and sys.stdout.isatty()  # there is none where it was closed
    return Console(soft_wrap=True, markup=False, highlight=False, width=None if terminal else 140)


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes read like all other errors: one sentence, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


def run(command: Callable[[Any], int | None], args: Any, interrupted: str) -> int:
    """Run a command; a user's mistake prints one sentence and gives a non-zero exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a narrow locale must not lose the answer
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = command(args) or 0
        print(end="", flush=True)
        return code
    except ElasticError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:  # of standard output: errors of other files are translated where they are used
        if not isinstance(error, BrokenPipeError):  # else its reader has left, as `head` does
            print(f"error: cannot write the output ({error}); check the disk it goes to", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def enter(module: str) -> NoReturn:
    """Import a command line and run it."""
    main = importlib.import_module(module).main
    interrupt.started()
    sys.exit(main())
