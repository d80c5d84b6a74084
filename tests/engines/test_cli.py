"""What both command lines share: exit codes, notes, version, and the name they were called by."""

import argparse
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engines import __version__
from engines.cli import PACKAGES, Parser, program, progress, run
from engines.entry import INTERRUPTED, enter
from engines.errors import BundleError, OptionError
from tests.support.cases import ROOT

logger = logging.getLogger("engines.somewhere")


def talk(args: Any) -> None:
    logger.info("a detail")
    logger.warning("a %s", "warning")
    logger.error("an error")
    logging.getLogger("another.library").warning("not ours")


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [((), ["a warning", "an error"]), (("-v",), ["a detail", "a warning", "an error"]), (("-q",), ["an error"]),
     (("--verbose",), ["a detail", "a warning", "an error"]), (("--quiet",), ["an error"])],
)  # fmt: skip
def test_log_messages_are_notes(argv: tuple[str, ...], wanted: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # a second run prints nothing twice
        assert run(talk, Parser().parse_args(argv), "interrupted") == 0
        out, err = capsys.readouterr()
        assert out == "" and [line for line in err.splitlines() if "not ours" not in line] == [
            f"note: {line}" for line in wanted
        ]
    assert not any(logging.getLogger(name).handlers for name in PACKAGES)


def test_notes_may_stand_before_and_after_the_command() -> None:
    top = Parser(prog="x")
    top.add_subparsers(dest="command", parser_class=Parser).add_parser("go")
    for argv in (["-q", "go"], ["go", "-q"]):
        assert top.parse_args(argv).log_level == logging.ERROR
    assert not hasattr(top.parse_args(["go"]), "log_level")
    with pytest.raises(SystemExit) as ended:
        top.parse_args(["go", "-q", "-v"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [(BundleError("no bundle; build one"), 1, "error: no bundle; build one\n"),
     (OptionError("window is 0"), 2, "error: window is 0\n"), (KeyboardInterrupt(), INTERRUPTED, "\ncut short\n")],
)  # fmt: skip
def test_exit_codes(error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: Any) -> None:
        raise error

    assert run(fail, argparse.Namespace(), "cut short") == code
    assert capsys.readouterr() == ("", text)
    assert run(lambda args: args, 3, "") == 3


def test_errors_of_this_project_are_not_hidden() -> None:
    def fail(args: Any) -> None:
        raise AssertionError("an invariant")

    with pytest.raises(AssertionError, match="an invariant"):
        run(fail, argparse.Namespace(), "")
    assert not any(logging.getLogger(name).handlers for name in PACKAGES)


def test_a_wrong_option_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        Parser(prog="python -m runtime").parse_args(["--colour"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: unknown option --colour; see `python -m runtime --help`\n"


@pytest.mark.parametrize(
    ("started", "name"),
    [("/clone/runtime/__main__.py", "python -m runtime"), ("/usr/bin/elastic-run", "elastic-run"),
     ("/usr/bin/pytest", "python -m runtime")],
)  # fmt: skip
def test_the_name_it_was_called_by(started: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert program("runtime") == name


@pytest.mark.parametrize("package", ["export", "runtime"])
def test_version(package: str) -> None:
    done = subprocess.run([sys.executable, "-m", package, "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"elastic-diffusion {__version__}\n", "")


def test_enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code of `main`, and one line for Ctrl-C in it or while its module is imported."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "line_that_ends.py").write_text("def main(): return 7\n")
    (tmp_path / "line_in_a_hurry.py").write_text("raise KeyboardInterrupt\n")
    (tmp_path / "line_cut_short.py").write_text("def main(): raise KeyboardInterrupt\n")
    assert enter("line_that_ends") == 7
    for module in ("line_in_a_hurry", "line_cut_short"):
        assert enter(module) == INTERRUPTED
        assert capsys.readouterr() == ("", "\ninterrupted\n")


@pytest.mark.parametrize(("total", "shown"), [(1, [1]), (3, [1, 2, 3]), (25, [3, 5, 8, 10, 13, 15, 18, 20, 23, 25])])
def test_progress_off_a_terminal(total: int, shown: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each tenth on standard error, and none with -q."""

    def work(args: Any) -> None:
        with progress("work", total) as done:
            for number in range(total + 1):
                done(number)

    assert run(work, Parser().parse_args([]), "") == run(work, Parser().parse_args(["-q"]), "") == 0
    out, err = capsys.readouterr()
    assert out == "" and [line.split(",")[0] for line in err.splitlines()] == [f"work: {n} of {total}" for n in shown]


def test_progress_at_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    with progress("work", 2) as done:
        done(1)
    out, err = capsys.readouterr()
    assert out == "" and "work" in err and "50%" in err


def test_a_file_that_cannot_be_used_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: Any) -> None:
        raise PermissionError(13, "Permission denied", "/secret")

    assert run(fail, argparse.Namespace(), "") == 1
    assert capsys.readouterr() == ("", "error: cannot use /secret (Permission denied); check the path\n")
