"""Files that a command writes, checked before the work: it is not done in vain, and no other file is written over."""

import os
from pathlib import Path

from engines.errors import OptionError

# How a file of each kind begins.
ANY, TRACE, FIGURES = "", '{"step"', '{\n "command"'
PLOTS = {".png": "\x89PNG", ".svg": "<?xml", ".pdf": "%PDF"}  # by ending


def check_output(file: Path | None, begin: str, remedy: str) -> None:
    """Raise OptionError unless `file` can be written: it is new or empty, or its content begins with `begin`.

    Folders above it that do not exist are made when it is written. A device such as /dev/stdout is not looked at.
    """
    if file is None:
        return
    place = next(path for path in (file, *file.absolute().parents) if os.path.lexists(path))
    try:
        if place != file and not place.is_dir():
            raise NotADirectoryError(20, f"{place} is not a directory")
        if not os.access(place, os.W_OK):
            raise PermissionError(13, "Permission denied")
        if file.is_dir():
            raise IsADirectoryError(21, "Is a directory")
        if not file.is_file():
            return
        with file.open("rb") as stream:
            found = stream.read(len(begin))
    except OSError as error:
        raise OptionError(f"cannot write {file} ({error.strerror}); {remedy}") from error
    if found not in (b"", begin.encode("latin-1")):
        raise OptionError(f"{file} holds something else than this command writes; {remedy}")


def check_distinct(*files: Path | None) -> None:
    """Raise OptionError if two outputs of a command are the same file."""
    given = [file.absolute() for file in files if file is not None]
    if len(set(given)) < len(given):
        raise OptionError(f"{given[0]} is to hold two outputs; give each a file of its own")
