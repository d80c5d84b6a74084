"""Stamps: what files were made from, so that a build goes on where an earlier one stopped.

A stamp is a JSON file in the bundle's `stamps/` with the SHA-256 of a key and
the size and SHA-256 of the files made from that key. Files are reused if the key
is the same and they still have that content; both are checked every time.
Parts and compiled plans have the same kind of stamp.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.bundle import STAMPS
from engines.files import describe, link, write_atomically
from engines.record import NEXT

Files = dict[str, dict[str, Any]]  # path below the bundle -> {"size": bytes, "sha256": hex}, as in the manifest


def kept(root: Path, names: list[str], key: str, make: Callable[[], Files]) -> Files:
    """The entries of the files `names` below `root` and of their stamp; calls `make` unless they are up to date.

    `key` holds everything the files are made from. `make` writes the files and
    returns their entries, hashed while they were written (`write`). Raises
    OSError as the disk does.
    """
    return taken(root, names, key) or stamp(root, names, key, make())


def taken(root: Path, names: list[str], key: str) -> Files | None:
    """The entries of `names` and their stamp if they are up to date (`reusable`), in `root` or in the bundle around it.

    A build that writes to a bundle's folder NEXT links what the bundle has. Raises OSError.
    """
    files = reusable(root, names, key)
    if files is None and root.name == NEXT:
        files = reusable(root.parent, names, key)
        for name in files or ():
            link(root.parent / name, root / name)
    return files


def reusable(root: Path, names: list[str], key: str) -> Files | None:
    """The entries of `names` and their stamp if an earlier build made them from `key` and they are unchanged."""
    path = stamp_path(names)
    try:
        content = json.loads((root / path).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("key") != digest(key):
            return None
        files = {name: describe(root / name) for name in names}
        if content != {"key": digest(key), "files": files}:
            return None
        return files | {path: describe(root / path)}
    except (OSError, ValueError):
        return None


def stamp(root: Path, names: list[str], key: str, files: Files) -> Files:
    """Write the stamp of `files`, which were made from `key`; returns their entries and the stamp's."""
    assert list(files) == names, f"made {list(files)}, expected {names}"
    path = stamp_path(names)
    content = json.dumps({"key": digest(key), "files": files}).encode()
    return files | {path: write(root / path, content)}


def write(path: Path, content: bytes) -> dict[str, Any]:
    """Write `content` atomically; returns the file's entry without reading it again."""
    write_atomically(path, content)
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def stamp_path(names: list[str]) -> str:
    """The stamp of the files `names` is named after the first of them."""
    return f"{STAMPS}/{names[0].replace('/', '-')}.json"


def digest(key: str) -> str:
    """SHA-256 (hex) of a key."""
    return hashlib.sha256(key.encode()).hexdigest()
