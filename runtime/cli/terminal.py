"""The command `chat`: at a terminal, answers are redrawn in place while masks are filled; in a pipe, they are printed.

`runtime.chat` yields the texts to show. A message is a line, what is pasted at a terminal, or what stands between two
`\"\"\"`.
"""

import argparse
import io
import sys
import termios
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress

from rich.console import Console
from rich.live import Live
from rich.text import Text

from engines.errors import BackendError, ElasticError, OptionError, PromptError
from runtime.answer import MASK
from runtime.chat import Chat, Note
from runtime.cli.commands import opened
from runtime.cli.options import given_options, policy_of
from runtime.decoding.generate import Output

PROMPT, MORE = "> ", ". "
QUOTES = '"""'
COMMANDS = {
    "/image": "FILE: attach an image to the next message (vision models)",
    "/reset": "forget the conversation; the figures and --system stay",
    "/stats": "totals of the answers: tokens, steps, seconds",
    "/help": "this list",
    "/exit": "end the chat, as Ctrl-D does; Ctrl-C stops an answer or drops what is typed, and the chat goes on",
}
HELP = COMMANDS | {
    "//": "starts a message with a slash",
    QUOTES: f"starts a message of several lines, which the next {QUOTES} ends; pasted lines are one message",
}
# Control characters could move the cursor or change the terminal: their Unicode pictures are drawn instead.
PICTURES: dict[int, int | None] = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
PICTURES |= {ord("\r"): None, 127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)


def drawn(text: str) -> Text:
    """Text without control characters, masks dimmed."""
    safe = Text(text.translate(PICTURES))
    safe.highlight_words([MASK], "dim")
    return safe


def view(text: str, console: Console) -> Text:
    """As many lines as the terminal has, with the first mask among them; lines that scrolled out cannot be redrawn."""
    lines = drawn(text).wrap(console, console.width)
    first = next((number for number, line in enumerate(lines) if MASK in line.plain), len(lines))
    top = max(0, min(first - console.height // 2, len(lines) - console.height))
    return Text("\n").join(lines[top : top + console.height])


def draw(shown: Iterable[Note | str | Output], console: Console) -> None:
    """Redraw the answer in place until it is complete, then print all of it."""
    live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
    try:
        for item in shown:
            if isinstance(item, Note):
                note(item.text)
            elif isinstance(item, Output):
                live.update(drawn(item.text))
            else:
                live.start()
                live.update(view(item, console), refresh=True)
    finally:
        live.stop()


def write(shown: Iterable[Note | str | Output]) -> None:
    """Print the complete answer unchanged, for a pipe."""
    for item in shown:
        if isinstance(item, Note):
            note(item.text)
        elif isinstance(item, Output):
            print(item.text, flush=True)


def note(text: str) -> None:
    """Print a note to standard error."""
    print(f"note: {text}", file=sys.stderr)


@contextmanager
def without_echo() -> Iterator[None]:
    """Switch off the terminal's echo: keys typed in the body are kept for the next prompt and not drawn."""
    before = termios.tcgetattr(sys.stdin)
    during = list(before)
    during[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, during)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def next_line(prompt: str) -> str | None:
    """The next line of standard input, or lines that are pasted at once; None at its end."""
    try:
        return input(prompt).removesuffix("\r")
    except EOFError:
        print(end="\n" if prompt else "")
        return None


def next_message(prompts: tuple[str, str]) -> tuple[str, bool] | None:
    """The next message, and whether it is a line that may be a command; None at the end of the input."""
    line = next_line(prompts[0])
    if line is None:
        return None
    if not line.lstrip().startswith(QUOTES):
        return line, "\n" not in line.strip()
    text = line.lstrip()[len(QUOTES) :]
    while not text.rstrip().endswith(QUOTES):
        more = next_line(prompts[1])
        if more is None:
            return text, False
        text += f"\n{more}"
    return text.rstrip().removesuffix(QUOTES).strip("\n"), False


def run_command(chat: Chat, line: str) -> None:
    """Run one of the commands of HELP."""
    command, _, file = line.partition(" ")
    if command == "/image":
        try:
            if not file.strip():
                raise OptionError("/image needs a file; write /image photo.png")
            chat.attach(file.strip())
        except (OptionError, PromptError, BackendError) as error:
            print(f"error: {error}", file=sys.stderr)
    elif line == "/reset":
        chat.reset()
    elif line == "/stats":
        print(chat.figures, flush=True)
    elif line == "/help":
        print("\n".join(f"{name:8}{meaning}" for name, meaning in HELP.items()), flush=True)
    else:
        print(f"error: unknown command {line}; choose from {', '.join(COMMANDS)}, or write /{line}", file=sys.stderr)


def converse(chat: Chat, console: Console) -> None:
    """Answer message by message until the input ends.

    A prompt that cannot be decoded ends only its turn; at a terminal, so do Ctrl-C and any other error.
    """
    typed, drawing = sys.stdin.isatty(), sys.stdout.isatty()
    # A dumb terminal cannot redraw a line, and an ASCII one cannot show the mask.
    able = drawing and not console.is_dumb_terminal and not console.options.ascii_only

    def answer(text: str) -> None:
        with closing(chat.say(text)) as shown:
            if able and typed:
                with without_echo():
                    draw(shown, console)
            elif able:
                draw(shown, console)
            else:
                write(shown)

    def take_turn() -> bool:
        """Take one message; False at the end."""
        try:
            try:
                found = next_message((PROMPT, MORE) if typed and drawing else ("", ""))
            except KeyboardInterrupt:
                if not typed:
                    raise
                print("\nnothing is sent; Ctrl-D or /exit ends the chat", file=sys.stderr)
                return True
            if found is None:
                return False
            text, may_be_command = found
            word = text.strip()
            if may_be_command and word.startswith("//"):
                answer(text.replace("//", "/", 1))
            elif may_be_command and word.startswith("/"):
                if word == "/exit":
                    return False
                run_command(chat, word)
            elif word:
                answer(text)
        except ElasticError as error:
            if not typed and not isinstance(error, PromptError):
                raise
            print(f"error: {error}", file=sys.stderr)
        return True

    if typed and drawing:
        with suppress(ImportError):
            import readline  # line editing of input()

            readline.parse_and_bind("set enable-bracketed-paste on")
        print(f"[{chat.model.backend}] /help lists the commands, Ctrl-D ends")
    while True:
        try:
            if not take_turn():
                return
        except KeyboardInterrupt:
            if not typed:
                raise
            with suppress(KeyboardInterrupt):  # pressed twice
                print("stopped", file=sys.stderr)


def chat_command(args: argparse.Namespace) -> None:
    """Load the bundle and chat until standard input ends."""
    if sys.stdin is None:
        raise PromptError("standard input is closed, and chat reads its messages there; give it a terminal or a pipe")
    if isinstance(sys.stdin, io.TextIOWrapper):  # a line that is not valid text must not end the chat
        if sys.stdin.isatty():
            sys.stdin.reconfigure(errors="surrogateescape")
        else:  # UTF-8 whatever the locale
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape", newline="\n")
    with opened(args) as model:
        chat = Chat(model, policy_of(args), given_options(args), args.system)
        converse(chat, Console(markup=False, highlight=False))  # no soft wrapping, which prevents redrawing
