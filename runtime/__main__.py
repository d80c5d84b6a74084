"""`python -m runtime`, and the console script `elastic-run`."""

import sys

from engines.entry import enter


def main() -> int:
    """Run the command line of `runtime`; returns its exit code."""
    return enter("runtime.cli")


if __name__ == "__main__":
    sys.exit(main())
