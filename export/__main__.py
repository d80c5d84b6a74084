"""`python -m export`, and the console script `elastic-export`."""

import sys

from engines.entry import enter


def main() -> int:
    """Run the command line of `export`; returns its exit code."""
    return enter("export.cli")


if __name__ == "__main__":
    sys.exit(main())
