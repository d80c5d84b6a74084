"""What the command lines share: errors as one sentence, log messages as notes, exit codes."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from rich.console import Console

from engines import __version__
from engines.entry import INTERRUPTED
from engines.errors import ElasticError

PACKAGES = ("engines", "export", "runtime")  # whose log messages are printed


def screen() -> Console:
    """A console on standard output: as wide as the terminal, or 140 columns in a file or a pipe."""
    terminal = sys.stdout is not None and sys.stdout.isatty()  # None where the shell closed it
    return Console(soft_wrap=True, markup=False, highlight=False, width=None if terminal else 140)


def program(package: str) -> str:
    """How the command line of `package` was started: `elastic-run`, say, or `python -m runtime`."""
    name = os.path.basename(sys.argv[0])
    return name if name.startswith("elastic-") else f"python -m {package}"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors read like all others: one sentence, exit code 2.

    Every command takes `-v` and `-q`; a parser with commands takes `--version`, too.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        loudness = self.add_mutually_exclusive_group()
        for names, level, text in (
            (("-v", "--verbose"), logging.INFO, "also print what is loaded and how long it takes"),
            (("-q", "--quiet"), logging.ERROR, "print no notes"),
        ):
            loudness.add_argument(
                *names, dest="log_level", action="store_const", const=level, default=argparse.SUPPRESS, help=text
            )

    def add_subparsers(self, **options: Any) -> Any:
        self.add_argument("--version", action="version", version=f"elastic-diffusion {__version__}")
        return super().add_subparsers(**options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


class _Notes(logging.Handler):
    """Writes log messages to standard error, one line each: `note: …`."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"note: {record.getMessage()}", file=sys.stderr)


def run(command: Callable[[Any], int | None], args: Any, interrupted: str) -> int:
    """Run `command(args)` and return its exit code; an error of the user's prints one sentence.

    Log messages from `args.log_level` on (default: warnings) are printed as notes
    meanwhile. Ctrl-C prints the sentence `interrupted` and returns 130.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # characters that the locale lacks are escaped, not an error
        sys.stdout.reconfigure(errors="backslashreplace")
    notes, level = _Notes(), getattr(args, "log_level", logging.WARNING)
    for name in PACKAGES:
        logging.getLogger(name).addHandler(notes)
        logging.getLogger(name).setLevel(level)
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
        if not isinstance(error, BrokenPipeError):  # a reader such as `head` may close the pipe at any time
            print(f"error: cannot write the output ({error}); check the disk it goes to", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        for name in PACKAGES:
            logging.getLogger(name).removeHandler(notes)
            logging.getLogger(name).setLevel(logging.NOTSET)
