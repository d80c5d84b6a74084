"""The folder a bundle is built in: one build at a time, nobody else's files, nothing left of older builds."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from engines.bundle import CALIBRATION, MANIFEST, STAMPS, Bundle, Manifest
from engines.errors import BundleError, NewerBundleError
from engines.files import describe
from export.checkpoint import tokenizer
from export.compilers import compiler_folders

if TYPE_CHECKING:
    from export.build import BuildJob

LOCK = ".lock"
COMPILED = ("weights", "flavour", "capabilities")  # options that engines were built with


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """One build per folder at a time; raises BundleError while another runs."""
    with (root / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BundleError(f"another build is writing {root}; wait for it or choose another --out") from error
        yield


def prepare_folder(job: "BuildJob", force: bool) -> bool:
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
            refuse_foreign_files(job.root)
    if found is not None and not force:
        manifest = found.manifest
        same, other = manifest.checkpoint["identity"] == job.checkpoint.identity, others(job, manifest)
        if not same or other or found.config != job.config:
            named = f" ({', '.join(other)})" if other else ""
            what = f"with other options{named}" if same else "of another checkpoint"
            raise BundleError(f"{job.root} is a bundle {what}; choose another --out, or pass --force to replace it")
        texts = (job.checkpoint.directory / "config.json", *job.checkpoint.tokenizer_files())
        whole = intact(found) and all(found.manifest.files.get(p.name) == describe(p) for p in texts)
        if whole and set(job.backends) <= set(manifest.engines):
            return False
        extend_existing(job, manifest)
    (job.root / STAMPS).mkdir(exist_ok=True)
    if not whole:
        (job.root / MANIFEST).unlink(missing_ok=True)
    return True


def others(job: "BuildJob", manifest: Manifest) -> list[str]:
    """A bundle's options that are not those asked for; what is not said of a compiler may be anything."""
    had = {"precision": manifest.precision} | manifest.capacity
    asked = {"precision": job.precision} | vars(job.capacity)
    found = [f"{name} {value}" for name, value in had.items() if name != "rows" and value != asked[name]]
    for name, entry in manifest.engines.items():
        for option in COMPILED if name in job.backends else ():
            wanted = getattr(job, option)
            if option in entry and entry[option] != wanted and (wanted or option == "weights"):
                found.append(f"{name} {option} {entry[option] or 'whole'}")
    return found


def extend_existing(job: "BuildJob", manifest: Manifest) -> None:
    """Have a bundle's engines made again as they were, which takes up what is whole, and keep its calibration."""
    for entry in manifest.engines.values():
        for option in COMPILED:
            setattr(job, option, getattr(job, option) or entry.get(option))
    job.backends = [*manifest.engines, *(name for name in job.backends if name not in manifest.engines)]
    evidence = job.root / CALIBRATION
    if evidence.is_file() and describe(evidence) == manifest.files.get(CALIBRATION):
        job.files[CALIBRATION], job.defaults = manifest.files[CALIBRATION], manifest.defaults


def refuse_foreign_files(root: Path) -> None:
    """Raises BundleError where a folder holds files that no build has written."""
    own = {LOCK}
    if (root / STAMPS).is_dir():
        own |= {STAMPS, MANIFEST, "onnx", "engines", "config.json", CALIBRATION, *tokenizer.FILES}
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


def remove_stale(job: "BuildJob") -> None:
    """Remove what earlier builds with other options left in the folders that builds own."""
    for folder in (job.root / "onnx", job.root / STAMPS, *compiler_folders(job.root)):
        for path in folder.rglob("*") if folder.exists() else ():
            if path.is_file() and path.relative_to(job.root).as_posix() not in job.files:
                path.unlink()
