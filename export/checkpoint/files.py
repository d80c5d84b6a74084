"""Files of a checkpoint: their bytes and JSON objects, with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from engines.errors import CheckpointError

AGAIN = "download or save the checkpoint again"


def read_bytes(path: Path) -> bytes:
    """The bytes of a file; raises CheckpointError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {AGAIN}") from error


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, with or without a byte order mark; raises CheckpointError for anything else."""
    try:
        found = json.loads(read_bytes(path).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); {AGAIN}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a JSON {type(found).__name__}, expected an object; {AGAIN}")
    return found
