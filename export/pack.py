"""Packing: the part of a bundle that a deployment on some back ends needs, as a bundle of its own.

A LLaDA-8B bundle in int4 has 22 GB, of which ONNX Runtime reads 5.7.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engines.bundle import Bundle, write_manifest
from engines.errors import BundleError, OptionError
from engines.files import check_space, writing
from engines.registry import BACKENDS


def pack(bundle: Bundle, backends: Sequence[str], out: Path) -> Path:
    """Write what `backends` need of `bundle` to the folder `out`, which is new or empty, and return it.

    The exported parts are in it for eager PyTorch alone. Every file is checked before
    it is copied, and `out` appears when it is complete. Raises OptionError
    for an unknown back end or a folder that holds files, BundleError for engines
    that the bundle does not have, a damaged file or a full disk.
    """
    for name in backends:
        if name not in BACKENDS:
            raise OptionError(f"unknown back end {name!r}; choose from {', '.join(BACKENDS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OptionError(f"{out} is not an empty folder; choose another --out")
    compiled = [name for name in backends if BACKENDS[name].compiled]
    needed = [bundle.files_for(name if name in compiled else None) for name in backends]
    files = {name: entry for name, entry in bundle.manifest.files.items() if name in set().union(*needed)}
    with writing(out, "choose another --out", BundleError):
        out.parent.mkdir(parents=True, exist_ok=True)
        check_space(out, sum(entry["size"] for entry in files.values()))
        bundle.check(files)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
            made = Path(folder) / "pack"
            for name in files:
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle.file(name), made / name)
            engines = {name: bundle.engines(name) for name in compiled}
            parts = bundle.exported if len(compiled) < len(backends) else {}
            write_manifest(made, replace(bundle.manifest, parts=parts, engines=engines, files=files, replaces=None))
            os.replace(made, out)
    return out
