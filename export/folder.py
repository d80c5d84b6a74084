"""The folder a bundle is built in: one build at a time, nobody else's files, nothing left of older builds."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.bundle import CALIBRATION, MANIFEST, STAMPS, Bundle, Manifest
from engines.errors import BundleError, NewerBundleError
from engines.files import describe
from export.checkpoint import tokenizer
from export.compilers import compiler_folders

if TYPE_CHECKING:
    from export.build import BuildJob

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
        same = manifest.checkpoint["identity"] == job.checkpoint.identity
        alike = (found.config, found.capacity, manifest.precision) == (job.config, job.capacity, job.precision)
        if not same or not alike or not all(as_asked(job, name, entry) for name, entry in manifest.engines.items()):
            had = {"precision": manifest.precision} | vars(found.capacity)
            asked = {"precision": job.precision} | vars(job.capacity)
            other = ", ".join(
                f"{name} {value}" for name, value in had.items() if value != asked[name] and name != "rows"
            )
            what = f"with other options{other and f' ({other})'}" if same else "of another checkpoint"
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


def as_asked(job: "BuildJob", name: str, entry: dict[str, Any]) -> bool:
    """Whether engines that are there are those that are asked for; what is not said of a compiler may be anything."""
    if name not in job.backends:
        return True
    said = {option: getattr(job, option) for option in ("flavour", "capabilities") if getattr(job, option)}
    return all(entry.get(option, value) == value for option, value in said.items()) and (
        entry.get("weights", job.weights) == job.weights
    )


def extend_existing(job: "BuildJob", manifest: Manifest) -> None:
    """Have a bundle's engines made again as they were, which takes up what is whole, and keep its calibration."""
    for entry in manifest.engines.values():
        for option in ("weights", "flavour", "capabilities"):
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
