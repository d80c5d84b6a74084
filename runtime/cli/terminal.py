"""A chat at a terminal, redrawn in place while masks are filled, or in a pipe; and its commands.

It knows no ids, no events and no history: `runtime.chat` yields the text to show.
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

from engines.errors import BackendError, OptionError, PromptError
from runtime.chat import MASK, Chat, Note
from runtime.cli.commands import opened
from runtime.cli.options import given_options, policy_of
from runtime.decoding.generate import Output

PROMPT = "> "
HELP = {
    "/image": "FILE: look at an image, for what is said next (models that see)",
    "/reset": "forget the conversation (the figures and --system stay)",
    "/stats": "what the answers have cost",
    "/help": "this list",
    "/exit": "end, as Ctrl-D does; Ctrl-C stops an answer and forgets its turn",
}
# Control characters would move the cursor or worse: they are drawn as pictures of themselves.
PICTURES: dict[int, int | None] = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
PICTURES |= {ord("\r"): None, 127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)


def drawn(text: str) -> Text:
    """Text that is safe to draw, masks dimmed."""
    safe = Text(text.translate(PICTURES))
    safe.highlight_words([MASK], "dim")
    return safe


def view(text: str, console: Console) -> Text:
    """As many lines as the terminal has: what has scrolled out of it cannot be redrawn. The first mask is in view."""
    lines = drawn(text).wrap(console, console.width)
    first = next((number for number, line in enumerate(lines) if MASK in line.plain), len(lines))
    top = max(0, min(first - console.height // 2, len(lines) - console.height))
    return Text("\n").join(lines[top : top + console.height])


def draw(shown: Iterable[Note | str | Output], console: Console) -> None:
    """Redraw the answer in place until it is whole; it then stands there in full."""
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
    """For a pipe: the answer when it is whole, as it is."""
    for item in shown:
        if isinstance(item, Note):
            note(item.text)
        elif isinstance(item, Output):
            print(item.text, flush=True)


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


@contextmanager
def unheard() -> Iterator[None]:
    """Keys typed meanwhile are kept for the next prompt, but not echoed into the drawing."""
    before = termios.tcgetattr(sys.stdin)
    during = list(before)
    during[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, during)
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def lines(prompt: str) -> Iterator[str]:
    """What the user types, to the end of standard input."""
    while True:
        try:
            yield input(prompt)
        except EOFError:
            print(end="\n" if prompt else "")
            return


def obey(chat: Chat, line: str) -> None:
    command, _, file = line.partition(" ")
    if command == "/image":
        try:
            if not file.strip():
                raise OptionError("/image takes a file, as in /image photo.png")
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
        print(f"error: there is no command {line}; there are {', '.join(HELP)}", file=sys.stderr)


def converse(chat: Chat, console: Console) -> None:
    """Answer line by line; a prompt that cannot be decoded, and Ctrl-C at a terminal, cost one turn only."""
    typed, drawing = sys.stdin.isatty(), sys.stdout.isatty()
    # Without these a line cannot be redrawn, or the mask not be written.
    able = drawing and not console.is_dumb_terminal and not console.options.ascii_only
    if typed and drawing:
        with suppress(ImportError):
            import readline  # noqa: F401  # what input() edits lines with
        print(f"[{chat.model.backend}] /help lists the commands, Ctrl-D ends")
    for line in lines(PROMPT if typed and drawing else ""):
        word = line.strip()
        if word == "/exit":
            return
        try:
            if word.startswith("/"):
                obey(chat, word)
            elif word:
                with closing(chat.say(line)) as shown:
                    if able and typed:
                        with unheard():
                            draw(shown, console)
                    elif able:
                        draw(shown, console)
                    else:
                        write(shown)
        except PromptError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            if not typed:
                raise
            print("stopped", file=sys.stderr)


def chat_command(args: argparse.Namespace) -> None:
    if isinstance(sys.stdin, io.TextIOWrapper):  # a line that is not text must not end the chat
        sys.stdin.reconfigure(errors="surrogateescape")
    with opened(args) as model:
        chat = Chat(model, policy_of(args), given_options(args), args.system)
        converse(chat, Console(markup=False, highlight=False))  # soft wrapping would defeat redrawing
