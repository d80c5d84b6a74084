"""Writing files: atomically, with hashes, and with errors of the operating system translated in one place."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engines.errors import BundleError, ElasticError, OptionError

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


@contextmanager
def writing(path: Path, remedy: str, error_type: type[ElasticError] = OptionError) -> Iterator[None]:
    """Translate an OSError of the body into `error_type`: "cannot write PATH (reason); REMEDY"."""
    try:
        yield
    except OSError as error:
        raise error_type(f"cannot write {path} ({error.strerror or error}); {remedy}") from error


def check_space(folder: Path, need: int) -> None:
    """Raise BundleError if the disk of `folder`, which may not exist yet, has less than `need` bytes free."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if need > free:
        raise BundleError(
            f"{folder} needs {need / 1e9:.3f} GB of disk, and {free / 1e9:.3f} GB are free there; free some, or choose "
            "another --out"
        )


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at `path` in one step: a reader finds the old content or the new; raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def link(source: Path, path: Path) -> None:
    """Give the file `source` the name `path` as well, in one step; a copy where the file system has no links.

    Raises OSError.
    """
    if path.exists() and path.samefile(source):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), temporary)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(source, temporary)
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


def signed(content: dict[str, Any]) -> bytes:
    """The bytes of a JSON file with its own SHA-256 beside `content`."""
    digest = hashlib.sha256(canonical(content)).hexdigest()
    return json.dumps(content | {"sha256": digest}, indent=1).encode() + b"\n"


def canonical(content: dict[str, Any]) -> bytes:
    """JSON of `content` that does not depend on the order of keys, for hashes."""
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
