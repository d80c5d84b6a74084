"""`python -m export build|verify|inspect`."""

from engines.cli import enter

if __name__ == "__main__":
    enter("export.cli")
