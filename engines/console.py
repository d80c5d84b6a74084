"""What both command lines share: errors as one sentence, and quiet ends."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from engines.errors import ElasticError

INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes read like all other errors: one sentence, exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


def run(command: Callable[[Any], int | None], args: Any, interrupted: str) -> int:
    """Run a command; a user's mistake prints one sentence and gives a non-zero exit code."""
    try:
        return command(args) or 0
    except ElasticError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
