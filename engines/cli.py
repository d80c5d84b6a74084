"""What the command lines share: errors as one sentence, log messages as notes, help, progress, exit codes."""

import argparse
import difflib
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import Progress

from engines import __version__
from engines.entry import INTERRUPTED
from engines.errors import ElasticError
from engines.options import spelled

PACKAGES = ("engines", "export", "runtime")  # whose log messages are printed


def screen() -> Console:
    """A console on standard output: as wide as the terminal, or 140 columns in a file or a pipe."""
    terminal = sys.stdout is not None and sys.stdout.isatty()  # None where the shell closed it
    return Console(soft_wrap=True, markup=False, highlight=False, width=None if terminal else 140)


def program(package: str) -> str:
    """How the command line of `package` was started: `elastic-run`, say, or `python -m runtime`."""
    name = os.path.basename(sys.argv[0])
    return name if name.startswith("elastic-") else f"python -m {package}"


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows the default of every option."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.option_strings or action.required or action.default is argparse.SUPPRESS or "default" in text:
            return text
        default = spelled(None if action.default == [] else action.default)
        return f"{text} (default: {default.replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors read like all others: one sentence, exit code 2.

    Every command takes `-v` and `-q`; a parser with commands takes `--version`, too. `example` has the arguments of a
    call that the help shows. Options are not abbreviated, and one that does not exist is named before what it makes
    missing.
    """

    def __init__(self, example: str = "", **options: Any):
        super().__init__(**{"formatter_class": Help, "allow_abbrev": False, **options})
        if example:
            self.epilog = f"example:\n  {self.prog} {example}"
        loudness = self.add_mutually_exclusive_group()
        for names, level, text in (
            (("-v", "--verbose"), logging.INFO, "also print what is loaded and how long it takes"),
            (("-q", "--quiet"), logging.ERROR, "print neither notes nor progress"),
        ):
            loudness.add_argument(
                *names, dest="log_level", action="store_const", const=level, default=argparse.SUPPRESS, help=text
            )

    def add_subparsers(self, **options: Any) -> Any:
        self.add_argument("--version", action="version", version=f"elastic-diffusion {__version__}")
        return super().add_subparsers(**options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        given = sys.argv[1:] if args is None else list(args)
        self._check_names(given)
        return super().parse_known_args(given, namespace)

    def _check_names(self, given: Sequence[str]) -> None:
        """Report the first word that argparse would take for an option and that is none."""
        known = self._option_string_actions
        for word in given:
            if word == "--" or (self._subparsers and not word.startswith("-")):
                return  # the rest is no option, or another parser's
            name = word.partition("=")[0]
            option = name.startswith("--") or (name[:1] == "-" and name[1:2].isalpha() and name[:2] not in known)
            if option and " " not in word and name not in known:
                near = difflib.get_close_matches(name, known, 1)
                self.error(f"unknown option {name}" + (f" (the closest is {near[0]})" if near else ""))

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


class _Notes(logging.Handler):
    """Writes log messages to standard error, one line each: `note: …`."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"note: {record.getMessage()}", file=sys.stderr)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how far the body is, which calls the function with the number that is done, out of `total`.

    It is shown on standard error: a bar at a terminal, a line for each tenth elsewhere, nothing with `-q`.
    """
    console, began = Console(stderr=True), time.perf_counter()
    hidden = not logging.getLogger(PACKAGES[0]).isEnabledFor(logging.WARNING)
    if console.is_terminal:
        with Progress(console=console, disable=hidden, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    tenths = 0

    def line(done: int) -> None:
        nonlocal tenths
        if not hidden and 10 * done // total > tenths:
            tenths = 10 * done // total
            print(f"{what}: {done} of {total}, {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)

    yield line


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
    except OSError as error:
        if error.filename is not None:
            print(f"error: cannot use {error.filename} ({error.strerror}); check the path", file=sys.stderr)
            return 1
        # of standard output: errors of other files have a name
        if not isinstance(error, BrokenPipeError):  # a reader such as `head` may close the pipe at any time
            print(f"error: cannot write the output ({error}); check the disk it goes to", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        for name in PACKAGES:
            logging.getLogger(name).removeHandler(notes)
            logging.getLogger(name).setLevel(logging.NOTSET)
