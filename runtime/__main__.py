"""`python -m runtime generate|eval|verify`."""

import sys

from runtime.cli import main

if __name__ == "__main__":
    sys.exit(main())
