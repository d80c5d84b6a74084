"""`python -m export build|verify|inspect`."""

from engines.console import enter

if __name__ == "__main__":
    enter("export.cli")
