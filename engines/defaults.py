"""A bundle's decoding defaults, and the measurement that they rest on."""

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from engines.bundle import Bundle, inside, read_manifest, write_manifest
from engines.errors import BundleError
from engines.files import describe, write_atomically, writing
from engines.locks import locked

CALIBRATION = "calibration.json"


def set_defaults(root: Path, defaults: dict[str, Any], file: str, content: dict[str, Any], whole: bool = False) -> None:
    """Change a bundle's decoding defaults, and keep the measurement behind them as its JSON file `file`.

    `defaults` are merged into those that are there; if `whole`, they replace them. The
    file gets a name of its own (`calibrations`), so that the old one is whole until the
    manifest is replaced. Raises BundleError if `root` is no bundle, is being written or
    cannot be written.
    """
    read_manifest(root)  # before a lock is left in a folder that is no bundle
    with writing(root, "make it writable", BundleError), locked(root):
        manifest = read_manifest(root)
        old = calibrations(manifest.files)
        first = inside(root, file, manifest.folder)
        others = (first.with_stem(f"{first.stem}-{number}") for number in count(2))
        path = next(path for path in chain([first], others) if not path.exists())
        write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")
        files = {other: entry for other, entry in manifest.files.items() if other not in old}
        files[path.name] = describe(path)
        kept = {} if whole else manifest.defaults
        write_manifest(root, replace(manifest, defaults=kept | defaults, files=files))
        for other in old:
            path.with_name(other).unlink(missing_ok=True)


def evidence(bundle: Bundle) -> dict[str, Any]:
    """The measurement behind a bundle's calibrated defaults; empty without one. Raises BundleError if it is damaged."""
    for name in calibrations(bundle.manifest.files):
        found: dict[str, Any] = json.loads(bundle.file(name).read_bytes())
        return found
    return {}


def calibrations(names: Iterable[str]) -> list[str]:
    """Those of `names` that are measurements behind calibrated defaults: calibration.json, calibration-2.json, …"""
    return [name for name in names if re.fullmatch(r"calibration(-\d+)?\.json", name)]
