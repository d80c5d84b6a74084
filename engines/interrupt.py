"""Ctrl-C while a command line is still being imported, which can take seconds: one line, no traceback.

From then on it is a KeyboardInterrupt, as everywhere. Imports next to nothing,
and does nothing where this project is not the program that was started.
"""

import os
import signal
import sys

INTERRUPTED = 130


def starting(package: str) -> None:
    """Leave quietly on Ctrl-C from here on, if `python -m package` was called and Ctrl-C is not ignored."""
    words = sys.orig_argv
    # While Python looks for the module of -m, argv begins with "-m".
    ours = sys.argv[:1] == ["-m"] and "-m" in words and words[words.index("-m") + 1 :][:1] == [package]
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


def started() -> None:
    """Everything is imported: Ctrl-C is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave(*_: object) -> None:
    os.write(2, b"\ninterrupted\n")
    os._exit(INTERRUPTED)
