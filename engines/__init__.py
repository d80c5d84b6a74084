"""The bottom of the project: what a bundle is, and what runs its parts. Imports neither `export` nor `runtime`."""

__version__ = "0.1.0"  # the one place: pyproject.toml and both command lines read it from here
