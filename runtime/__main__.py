"""`python -m runtime generate|eval|verify`."""

from engines.cli import enter

if __name__ == "__main__":
    enter("runtime.cli")
