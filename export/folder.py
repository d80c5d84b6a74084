"""The folder a bundle is built in: one build at a time, nobody else's files, nothing left of older builds."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from engines.bundle import MANIFEST, STAMPS, Bundle, describe
from engines.errors import BundleError, NewerBundleError
from engines.models import tokenizer
from export.compilers import compiler_folders

if TYPE_CHECKING:
    from export.build import Build

LOCK = ".lock"


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """One build per folder at a time; raises BundleError while another runs."""
    with (root / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BundleError(f"another build is writing {root}; wait for it or choose another --out") from error
        yield


def clear_the_way(job: "Build", force: bool) -> bool:
    """Whether there is something to build.

    Takes the manifest of an older state away first; that of an intact bundle to
    which back ends are added stays until the new one replaces it.
    """
    found, whole = None, False
    try:
        found = Bundle.open(job.root)
    except NewerBundleError:
        if not force:
            raise
    except BundleError:  # none, damaged, or of an older version: it is built again
        if not force:
            refuse_strangers(job.root)
    if found is not None and not force:
        manifest = found.manifest
        same = manifest.checkpoint["identity"] == job.checkpoint.identity
        quantized = [e["weights"] for n, e in manifest.engines.items() if n in job.backends and "weights" in e]
        options = (job.config, job.capacity, job.precision, quantized and [job.weights])
        if not same or (found.config, found.capacity, manifest.precision, quantized) != options:
            what = "with other options" if same else "of another checkpoint"
            raise BundleError(f"{job.root} is a bundle {what}; choose another --out, or pass --force to replace it")
        texts = (job.checkpoint.directory / "config.json", *job.checkpoint.tokenizer_files())
        whole = intact(found) and all(found.manifest.files.get(p.name) == describe(p) for p in texts)
        if whole and set(job.backends) <= set(manifest.engines):
            return False
        job.backends = [*manifest.engines, *(b for b in job.backends if b not in manifest.engines)]
    (job.root / STAMPS).mkdir(exist_ok=True)
    if not whole:
        (job.root / MANIFEST).unlink(missing_ok=True)
    return True


def refuse_strangers(root: Path) -> None:
    """Raises BundleError where a folder holds files that no build has written."""
    own = {LOCK}
    if (root / STAMPS).is_dir():
        own |= {STAMPS, MANIFEST, "onnx", "engines", "config.json", "calibration.json", *tokenizer.FILES}
    strange = sorted(p.name for p in root.iterdir() if p.name.removesuffix(".tmp") not in own)
    if strange:
        raise BundleError(f"{root} holds other files ({strange[0]}); choose an empty --out, or pass --force")


def intact(bundle: Bundle) -> bool:
    """Whether every file of a bundle is what its manifest says."""
    try:
        bundle.check()
    except BundleError:
        return False
    return True


def sweep(job: "Build") -> None:
    """Remove what earlier builds with other options left in the folders that builds own."""
    for folder in (job.root / "onnx", job.root / STAMPS, *compiler_folders(job.root)):
        for path in folder.rglob("*") if folder.exists() else ():
            if path.is_file() and path.relative_to(job.root).as_posix() not in job.files:
                path.unlink()
