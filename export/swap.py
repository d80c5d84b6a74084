"""How a finished build takes the place of the bundle before it.

A build writes to the folder `next/` of the bundle, under the bundle's own names.
`publish` then replaces the manifest, in one step: from there on the files in
`next/` are the bundle, and those before it are of no use. `settle` gives the new
files their names in the bundle and removes the old ones; the next build does so
where this one was killed. A folder without a manifest has nothing to keep, so
its files are moved, the stamps first, which say whose they are.

Only files that a manifest or a stamp names are overwritten or removed.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines.bundle import FORMAT, MANIFEST, STAMPS, Manifest, inside, read_manifest, write_manifest
from engines.errors import BundleError
from engines.files import describe, link
from engines.record import NEXT


def publish(root: Path, manifest: Manifest) -> None:
    """Make what a build wrote to `root`/next, and `manifest` describes, the bundle at `root`.

    Raises BundleError, with the bundle as it was, for a file in the way that no build wrote; OSError.
    """
    old = owned(root)
    for name in manifest.files.keys() - old:
        path = root / name
        if os.path.lexists(path) and not (path.is_file() and describe(path) == manifest.files[name]):
            raise BundleError(f"{root} holds {name}, which no build wrote; move it away, or choose another --out")
    if (root / MANIFEST).exists():
        write_manifest(root, replace(manifest, replaces=sorted(old)))
        settle(root)
        return
    for name in sorted(manifest.files, key=is_stamp, reverse=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(root / NEXT / name, root / name)
    write_manifest(root, manifest)
    remove(root, old - manifest.files.keys())
    discard(root / NEXT)


def settle(root: Path) -> None:
    """Bring the files of a bundle that lie in `next/` still to their places; raises OSError."""
    try:
        manifest = read_manifest(root)
    except BundleError:
        return
    if manifest.replaces is None:
        return
    for name in manifest.files:
        link(inside(root, name, NEXT), inside(root, name))
    remove(root, set(manifest.replaces) - manifest.files.keys())
    write_manifest(root, replace(manifest, replaces=None))
    discard(root / NEXT)


def remove(root: Path, names: set[str]) -> None:
    """Remove the files `names` of an earlier bundle, and the folders that they leave empty; raises OSError.

    The stamps go last: they say which files are a build's.
    """
    for name in sorted(names - {MANIFEST}, key=is_stamp):
        path = inside(root, name)
        path.unlink(missing_ok=True)
        for folder in path.relative_to(root).parents[:-1]:
            if (root / folder).is_dir() and not any((root / folder).iterdir()):
                (root / folder).rmdir()


def is_stamp(name: str) -> bool:
    """Whether the file `name` of a bundle is a stamp."""
    return name.startswith(f"{STAMPS}/")


def discard(folder: Path) -> None:
    """Remove the folder of a build, the stamps last, which say whose it is; raises OSError."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == STAMPS):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    folder.rmdir()


def owned(root: Path) -> set[str]:
    """The files below `root` that builds wrote: those that its manifest and stamps name, and these themselves."""
    manifest = content(root / MANIFEST)
    stamps = {path.name: content(path) for path in (root / STAMPS).glob("*.json")}
    named = [one["files"] for one in stamps.values() if "key" in one and isinstance(one.get("files"), dict)]
    found = {f"{STAMPS}/{name}" for name in stamps} | {MANIFEST} if named else set()
    if manifest.get("format") == FORMAT:
        lists = [value for value in map(manifest.get, ("files", "replaces")) if isinstance(value, dict | list)]
        found |= {MANIFEST, *(str(name) for names in lists for name in names)}
    return {name for name in found.union(*named) if is_below(root, name)}


def is_below(root: Path, name: str) -> bool:
    """Whether `name` is the path of a file in the folder `root` and of no folder, links followed."""
    path = root / name
    if "\0" in name or ".." in path.parts or not path.parent.resolve().is_relative_to(root.resolve()):
        return False
    return path != root and not path.is_dir()


def content(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one for a file that has none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
