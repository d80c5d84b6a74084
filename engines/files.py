"""Writing files: atomically, with hashes, and with errors of the operating system translated in one place."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engines.errors import ElasticError, OptionError


@contextmanager
def writing(path: Path, remedy: str, error_type: type[ElasticError] = OptionError) -> Iterator[None]:
    """Translate an OSError of the body into `error_type`: "cannot write PATH (reason); REMEDY"."""
    try:
        yield
    except OSError as error:
        raise error_type(f"cannot write {path} ({error.strerror or error}); {remedy}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at `path` in one step: a reader finds the old content or the new; raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal; raises OSError."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def describe(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest: its size in bytes and SHA-256."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def check_access(path: Path, error_type: type[ElasticError]) -> None:
    """Raise `error_type` if a file or folder may not be read, or not be looked for; one that is not there passes."""
    try:
        os.stat(path)
        if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            raise PermissionError(13, "Permission denied")
    except PermissionError as error:
        raise error_type(f"{path} may not be read ({error.strerror}); change its permissions") from error
    except (OSError, ValueError):
        return
