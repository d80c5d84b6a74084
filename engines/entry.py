"""The start of a command line: Ctrl-C is one line and exit code 130, also while slow modules are imported.

Imports nothing slow itself, and installs no signal handler.
"""

import importlib
import sys

INTERRUPTED = 130  # 128 + SIGINT, as shells count


def enter(module: str) -> int:
    """Import `module`, run its function `main` and return its exit code."""
    try:
        code: int = importlib.import_module(module).main()
        return code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
