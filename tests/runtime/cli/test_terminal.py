"""A chat on a simulated terminal, in a pipe, and on a pseudo-terminal."""

import codecs
import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

import runtime
import runtime.cli
from engines.entry import INTERRUPTED
from engines.errors import BackendError
from runtime.answer import MASK
from runtime.chat import Chat
from runtime.cli.terminal import COMMANDS, HELP, PROMPT, draw
from runtime.decoding.generate import Output
from tests.support.cases import ROOT, edit_manifest, sentence
from tests.support.chat import SHORT, answer, stop_at

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(text_bundle: Path) -> Iterator[runtime.Runtime]:
    with runtime.load(text_bundle, "onnxruntime", threads=1) as loaded:
        yield loaded


# Drawing


class Terminal:
    """A simulated terminal: it wraps, scrolls, moves up and erases lines. Unknown codes fail."""

    CODE = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|([^\x1b])", re.S)

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.gone: list[str] = []  # what scrolled out at the top
        self.rows: list[list[str]] = [[]]
        self.row = self.column = 0
        self.rest = ""  # a code that is cut short

    def feed(self, text: str) -> None:
        text = self.rest + text
        self.rest = re.search(r"(\x1b(\[[?\d;]*)?)?\Z", text)[0]  # type: ignore[index]
        text = text.removesuffix(self.rest)
        assert self.CODE.sub("", text) == "", f"{text!r} is written to the terminal"
        for argument, code, char in self.CODE.findall(text):
            if char == "\n":
                self.line()
            elif char in "\r\b" and char:
                self.column = 0 if char == "\r" else max(0, self.column - 1)
            elif char:
                assert char.isprintable(), f"{char!r} is written to the terminal"
                self.put(char)
            elif code == "A":
                self.row = max(0, self.row - int(argument or 1))
            elif code == "K":
                assert argument in ("", "0", "2"), argument
                self.rows[self.row] = [] if argument == "2" else self.rows[self.row][: self.column]
            else:
                assert code in "mhl", code

    def line(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.rows):
            self.rows.append([])
        if self.row == self.height:
            self.gone.append("".join(self.rows.pop(0)))
            self.row -= 1

    def put(self, char: str) -> None:
        if self.column + cell_len(char) > self.width:
            self.line()
        row = self.rows[self.row]
        row += [" "] * (self.column - len(row))
        if cell_len(char):
            row[self.column : self.column + cell_len(char)] = [char, *[""] * (cell_len(char) - 1)]
            self.column += cell_len(char)
        else:  # an accent, say
            row[self.column - 1] += char

    @property
    def screen(self) -> str:
        return "\n".join(map("".join, self.rows))

    @property
    def text(self) -> str:
        return "\n".join([*self.gone, self.screen])


def squeezed(text: str) -> str:
    return "".join(text.split())


def safe(text: str) -> str:
    """Text of these tests as it may reach a terminal."""
    shown = "".join(chr(0x2400 + ord(c)) if c < " " and c not in "\n\t" else c for c in text.replace("\r", ""))
    return re.sub("[\x80-\x9f]", "\ufffd", shown.replace("\x7f", "␡"))


@given(
    st.text(st.sampled_from("abc   é日\n\t\x1b\r\ufffd"), max_size=120), st.integers(0, 2**32 - 1),
    st.integers(2, 30), st.integers(1, 8), st.booleans(),
)  # fmt: skip
def test_drawing(words: str, seed: int, width: int, height: int, ends: bool) -> None:
    """For any length of answer and size of terminal, masks stay in view and the final text is complete."""
    out, terminal = io.StringIO(), Terminal(width, height)
    console = Console(file=out, force_terminal=True, width=width, height=height, markup=False, _environ={})
    order = np.random.default_rng(seed).permutation(len(words)).tolist()
    count = len(words) if ends else len(words) // 2
    frames = ["".join(MASK if i in order[k:] else c for i, c in enumerate(words)) for k in range(1, count + 1)]
    terminal.feed("before\n")

    def standing() -> str:
        """What is to be seen below the line that was there before."""
        terminal.feed(out.getvalue())
        out.seek(0)
        out.truncate()
        assert squeezed(terminal.text).startswith("before")
        return squeezed(terminal.text).removeprefix("before")

    def shown() -> Iterator[str | Output]:
        for now in frames:
            yield now
            assert standing() in squeezed(safe(now)), "lines of this frame, and of no other"
            assert (MASK in terminal.screen) == (MASK in now)
        if not ends:
            raise KeyboardInterrupt
        yield Output([], words, 1, 1, 1.0, 1.0, [], None, [])

    if ends:
        draw(shown(), console)
        assert standing() == squeezed(safe(words))
    else:
        with pytest.raises(KeyboardInterrupt):
            draw(shown(), console)
        assert standing() in squeezed(safe(frames[-1] if frames else ""))
    assert terminal.column == 0, "what follows begins a line"


# The command line


def talk(
    capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch, lines: str, *argv: object, typed: bool = False
) -> tuple[int, str, str]:
    """Run the command in this process; `typed` lines come from a terminal, but are answered to a pipe."""
    stdin = io.StringIO(lines)
    patch.setattr(stdin, "isatty", lambda: typed)
    patch.setattr(sys, "stdin", stdin)
    capsys.readouterr()
    try:
        code: Any = runtime.cli.main(["chat", *map(str, argv)])
    except SystemExit as ended:
        code = ended.code
    return code, *capsys.readouterr()


@pytest.fixture
def chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text_bundle: Path) -> Run:
    def run(lines: str, *argv: object, typed: bool = False) -> tuple[int, str, str]:
        return talk(capsys, monkeypatch, lines, text_bundle, "--gen-length", 8, *argv, typed=typed)

    return run


def test_in_a_pipe(model: runtime.Runtime, text_bundle: Path) -> None:
    command = [sys.executable, "-m", "runtime", "chat", str(text_bundle), "--gen-length", "8", "--threads", "1"]
    said = "Hi\n\n  \n/stats\nAnd?\n"
    env = {**os.environ, "FORCE_COLOR": "1"}
    done = subprocess.run(command, input=said.encode(), cwd=ROOT, capture_output=True, timeout=240, env=env)
    assert (done.returncode, done.stderr) == (0, b"")
    wanted = Chat(model, options=SHORT)
    first, figures, second = answer(wanted, "Hi").text, str(wanted.figures), answer(wanted, "And?").text
    out = done.stdout.decode()
    assert out.startswith(f"{first}\n1 turn, ") and out.endswith(f" in all\n{second}\n")
    figures_shown = out.removeprefix(f"{first}\n").removesuffix(f"{second}\n")
    assert re.sub(r"[\d.]+ s, [\d.]+", "", figures_shown) == re.sub(r"[\d.]+ s, [\d.]+", "", figures) + "\n"


def test_commands(chat: Run, model: runtime.Runtime) -> None:
    code, out, err = chat("/stats\n /help \n/exit\nHi\n")
    assert (code, err) == (0, "") and out.startswith("no answer yet\n")
    assert [line.split()[0] for line in out.splitlines()[1:]] == list(HELP), "nothing follows /exit"
    once = chat("Hi\n")
    assert once == (0, answer(Chat(model, options=SHORT), "Hi").text + "\n", "")
    assert chat("Hi\n/reset\nHi") == (0, 2 * once[1], ""), "a last line need not end"
    assert chat("Hi\nHi\n")[1] != 2 * once[1]
    assert chat("") == chat("\n \n\t\n") == (0, "", "")


@pytest.mark.parametrize("command", ["/nope", "/", "/resets", "/reset now", "/[bold]", "/ stats"])
def test_unknown_commands(chat: Run, command: str) -> None:
    code, out, err = chat(f"{command}\n/stats\n")
    assert (code, out) == (0, "no answer yet\n") and err.startswith("error: ") and err.count("\n") == 1
    sentence(err, command, *COMMANDS, f"or write /{command}")


@pytest.mark.parametrize(
    ("typed", "message"),
    [("//stats", "/stats"), (" //a//b", " /a//b"), ('"""/stats"""', "/stats"), ('"""a\nb"""', "a\nb"),
     ('"""\na\n\n/exit\n"""', "a\n\n/exit"), ('"""a\nb', "a\nb"), ('a """b', 'a """b')],
)  # fmt: skip
def test_messages(chat: Run, model: runtime.Runtime, typed: str, message: str) -> None:
    """A slash doubled, and several lines between quotes, which the end of the input ends, too."""
    assert chat(f"{typed}\n") == (0, model.generate(message, **SHORT).text + "\n", "")


def test_standard_input_is_closed(text_bundle: Path) -> None:
    argv = [sys.executable, "-m", "runtime", "chat", str(text_bundle)]
    done = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *argv], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    sentence(done.stderr, "error: standard input is closed", "a terminal or a pipe")


def test_an_error_at_a_terminal_costs_one_turn(chat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its kind: the conversation stays. A pipe ends with its exit code."""
    once = chat("Hi\n")[1]
    say, left = Chat.say, [1]

    def failing(self: Chat, text: str) -> Any:
        if left:
            left.pop()
            raise BackendError("out of memory; use less")
        return say(self, text)

    for typed in (True, False):
        left[:] = [1]
        with monkeypatch.context() as patch:
            patch.setattr(Chat, "say", failing)
            found = chat("Hi\nHi\n", typed=typed)
        assert found == ((0, once, "error: out of memory; use less\n") if typed else (1, "", found[2]))


def test_stop_strings(chat: Run, model: runtime.Runtime) -> None:
    text = model.generate("Hi", gen_length=24, window=1, tokens_per_step=1).text
    argv = ("--gen-length", 24, "--window", 1, "--tokens-per-step", 1, "--stop", text[5:7])
    assert chat("Hi\n", *argv) == (0, text.split(text[5:7])[0] + "\n", "")


@pytest.mark.parametrize(
    ("line", "words"),
    [("x" * 300, ("304 prompt ids", "length 256", "shorten")), ("<|mdm_mask|>", ("mask id 256", "leave it out")),
     ("caf\udce9", ("not valid Unicode",))],
)  # fmt: skip
def test_a_prompt_that_cannot_be_decoded_costs_one_turn(chat: Run, line: str, words: tuple[str, ...]) -> None:
    code, out, err = chat(f"Hi\n{line}\n/reset\nHi\n")
    assert code == 0 and out == 2 * chat("Hi\n")[1]
    assert err.startswith("error: ") and err.count("\n") == 1
    sentence(err, *words)


def test_bytes_that_are_no_text(text_bundle: Path) -> None:
    command = [sys.executable, "-m", "runtime", "chat", str(text_bundle), "--gen-length", "8", "--threads", "1"]
    env = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, input=b"caf\xe9\n/stats\n", cwd=ROOT, capture_output=True, timeout=240, env=env)
    assert (done.returncode, done.stdout) == (0, b"no answer yet\n")
    sentence(done.stderr.decode(), "error: ", "not valid Unicode")


def test_a_pipe_is_utf_8(model: runtime.Runtime, text_bundle: Path) -> None:
    """Whatever the locale: a byte order mark is dropped, and a line ends at a line feed only."""
    command = [sys.executable, "-m", "runtime", "chat", str(text_bundle), "--gen-length", "8", "--threads", "1"]
    env = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    said = "\ufeffé\u2028\x0c!\r\n".encode()
    done = subprocess.run(command, input=said, cwd=ROOT, capture_output=True, timeout=240, env=env)
    wanted = model.generate("é\u2028\x0c!", **SHORT).text + "\n"
    assert (done.returncode, done.stdout) == (0, wanted.encode("latin-1", "backslashreplace"))


def test_dropped_turns_are_reported(chat: Run) -> None:
    code, out, err = chat("".join(f"{letter * 90}\n" for letter in "abc"))
    assert code == 0 and out and err.startswith("note: ") and "left out" in err
    assert all(line.startswith("note: the oldest turn") for line in err.splitlines())


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [("--window 17", 2, ("window", "1 … 16")), ("--seed 1", 2, ("seed", "temperature")),
     ("--policy full --window 4", 2, ("full does not use window",)), ("--prompt Hi", 2, ("--prompt", "--help")),
     ("--gen-length 300", 2, ("gen_length", "1 … 256", "300"))],
)  # fmt: skip
def test_refused(chat: Run, argv: str, code: int, words: tuple[str, ...]) -> None:
    found = chat("Hi\n", *argv.split())
    assert found[:2] == (code, "") and found[2].startswith("error: ") and found[2].count("\n") == 1
    sentence(found[2], *words)


def test_refused_without_a_tokenizer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle_copy: Path
) -> None:
    edit_manifest(bundle_copy, lambda manifest: manifest["files"].pop("tokenizer.json"))
    code, out, err = talk(capsys, monkeypatch, "Hi\n", bundle_copy)
    assert (code, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1
    sentence(err, "no tokenizer.json", "use generate")


def test_options_of_the_command_line(chat: Run, model: runtime.Runtime) -> None:
    """Each does what the same keyword does."""
    cases: dict[str, dict[str, Any]] = {
        "--window 4 --threshold 0.3": {"window": 4, "threshold": 0.3},
        "--policy full --steps 2": {"policy": "full", "steps": 2},
        "--temperature 2 --seed 5 --top-k 9 --top-p 0.9": {"temperature": 2.0, "seed": 5, "top_k": 9, "top_p": 0.9},
        "--no-stop-at-eos": {"stop_at_eos": False}, "--logits-eos-inf": {"logits_eos_inf": True},
    }  # fmt: skip
    seen = set()
    for argv, options in cases.items():
        wanted = model.generate("Hi", **{**SHORT, **options})
        code, out, err = chat("Hi\n/stats\n", *argv.split())
        assert (code, err) == (0, "") and out.startswith(wanted.text + "\n"), argv
        assert f"{wanted.tokens} tokens in {wanted.steps} steps" in out, argv
        seen.add((wanted.text, wanted.steps))
    assert len(seen) >= 3, "the options make a difference"
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    with_system = model.generate(messages, **SHORT).text
    assert chat("Hi\n", "--system", "Be kind.")[1] == with_system + "\n" != chat("Hi\n")[1]


def test_ctrl_c_stops_an_answer(chat: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal the chat goes on without that turn; lines from a pipe end, as other commands do."""
    once = chat("Hi\n", "--policy", "full")[1]
    for typed in (True, False):
        with monkeypatch.context() as patch:
            stop_at(patch, 2)
            code, out, err = chat("Stop!\nHi\n", "--policy", "full", typed=typed)
        assert (code, out, err) == ((0, once, "stopped\n") if typed else (INTERRUPTED, "", "\ninterrupted\n"))


# A real terminal


CHILD = """
import fcntl, os, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from runtime.cli import main
from runtime.decoding.controller import Controller
step, stuck = Controller.step, [1]
def slow(self):
    if self.steps == 3 and stuck:
        stuck.pop()
        os.write(int(sys.argv[1]), b"!")
        time.sleep(1000)
    return step(self)
Controller.step = slow
sys.exit(main(sys.argv[2:]))
"""


def test_at_a_terminal(model: runtime.Runtime, text_bundle: Path) -> None:
    """An answer of several lines is redrawn in place; the first one hangs in its fourth step until Ctrl-C.

    Ctrl-C at the prompt drops what is typed and keeps the conversation; lines that are pasted are one message.
    """
    options = {"steps": 12, "gen_length": 96, "block_length": 96}
    argv = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    hung, signal_end = os.pipe()
    terminal, main, child = opened(signal_end, text_bundle, "--threads=1", "--policy=full", *argv)
    decoder, written = codecs.getincrementaldecoder("utf-8")(), []

    def read() -> bool:
        assert select.select([main], [], [], 60)[0], terminal.text
        try:
            written.append(decoder.decode(os.read(main, 4096)))
        except OSError:  # Linux reports the end of a pseudo-terminal with EIO
            return False
        terminal.feed(written[-1])
        return True

    def until(done: Callable[[], bool]) -> None:
        while not done():
            assert read(), terminal.text

    chat = Chat(model, "full", options)
    frames = [item for item in chat.say("Stop!") if isinstance(item, str)]
    chat.reset()
    try:
        until(lambda: terminal.text.endswith(f"\n{PROMPT}"))
        greeting = terminal.text
        os.write(main, b"Stop!\n")
        until(lambda: terminal.screen.count(MASK) == frames[2].count(MASK))
        assert not termios.tcgetattr(main)[3] & termios.ECHO, "what is typed now would spoil the drawing"
        assert os.read(hung, 1) == b"!"
        os.write(main, b"\x03")
        until(lambda: terminal.text.endswith(f"\nstopped\n{PROMPT}"))
        stopped = squeezed(greeting + "Stop!" + safe(frames[2]) + "stopped" + PROMPT)
        assert squeezed(terminal.text) == stopped
        os.write(main, b"Hi\n")
        until(lambda: len(squeezed(terminal.text)) > len(stopped) + 2 and terminal.text.endswith(f"\n{PROMPT}"))
        answered = stopped + squeezed("Hi" + safe(answer(chat, "Hi").text) + PROMPT)
        assert squeezed(terminal.text) == answered
        os.write(main, b"half a mess")
        until(lambda: terminal.text.endswith("half a mess"))
        os.write(main, b"\x03")
        until(lambda: squeezed(terminal.text).endswith("/exitendsthechat>"))
        os.write(main, b"\x1b[200~one\ntwo\x1b[201~\n")
        pasted = squeezed(safe(answer(chat, "one\ntwo").text) + PROMPT)
        until(lambda: squeezed(terminal.text).endswith(pasted))
        before = squeezed(terminal.text)
        assert "onetwo" in before.removeprefix(answered)
        os.write(main, b"\x04")
        while read():
            pass
        assert child.wait(240) == 0 and squeezed(terminal.text) == before
        assert termios.tcgetattr(main)[3] & termios.ECHO
    finally:
        child.kill()
        child.wait()
        for end_of_it in (main, hung, signal_end):
            os.close(end_of_it)
    drawn = "".join(written)
    assert drawn.count("\x1b[2K") > 2 * len(frames) and "\x1b[1A" in drawn, "lines were redrawn"


def opened(signal_end: int, *argv: object) -> "tuple[Terminal, int, subprocess.Popen[bytes]]":
    """The chat on a new terminal: that, the end of it where a person sits, and the process."""
    width, height = 40, 24
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE")}
    env |= {"TERM": "xterm", "PYTHONIOENCODING": "utf-8", "INPUTRC": "/dev/null", "LC_ALL": "C.UTF-8"}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(signal_end), "chat", *map(str, argv)], stdin=side, stdout=side,
        stderr=side, cwd=ROOT, env=env, start_new_session=True, pass_fds=[signal_end],
    )  # fmt: skip
    os.close(side)
    return Terminal(width, height), main, child
