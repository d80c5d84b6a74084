"""The folder a bundle is built in.

`locked` keeps other builds out. `existing_bundle`, `differences`,
`is_whole` and `extended` read what lies there and change nothing; `prepare` and
`remove_stale` change the folder.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from engines.bundle import CALIBRATION, LOCK, MANIFEST, STAMPS, Bundle, Manifest
from engines.errors import BundleError, NewerBundleError
from engines.files import describe
from export import compilers
from export.checkpoint import tokenizer
from export.job import BuildJob
from export.options import BuildOptions, engine_options
from export.stamps import Files


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the folder's lock; raises BundleError while another build holds it."""
    with (root / LOCK).open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BundleError(f"another build is writing {root}; wait for it or choose another --out") from error
        yield


def existing_bundle(root: Path) -> Bundle | None:
    """The bundle in `root`; None for an empty folder, an unfinished build, a damaged bundle or an older version.

    Raises NewerBundleError for a bundle of a later version, BundleError for other files.
    """
    try:
        return Bundle.open(root)
    except NewerBundleError:
        raise
    except BundleError:
        refuse_foreign_files(root)
        return None


def refuse_foreign_files(root: Path) -> None:
    """Raise BundleError where `root` holds files that no build has written."""
    own = {LOCK}
    if (root / STAMPS).is_dir():
        own |= {STAMPS, MANIFEST, "onnx", "engines", "config.json", CALIBRATION, *tokenizer.FILES}
    foreign = sorted(path.name for path in root.iterdir() if path.name.removesuffix(".tmp") not in own)
    if foreign:
        raise BundleError(f"{root} holds other files ({foreign[0]}); choose an empty --out, or pass --force")


def refuse_other_bundle(job: BuildJob, bundle: Bundle) -> None:
    """Raise BundleError unless `bundle` is of the job's checkpoint, content included, and has its options."""
    named = ", ".join(differences(job, bundle.manifest))
    if bundle.manifest.checkpoint["identity"] != job.checkpoint.identity:
        what = "of another checkpoint"
    elif named or bundle.config != job.config:
        what = f"with other options ({named})" if named else "with other options"
    else:
        return
    raise BundleError(f"{job.root} is a bundle {what}; choose another --out, or pass --force to replace it")


def differences(job: BuildJob, manifest: Manifest) -> list[str]:
    """The options of a bundle that differ from the job's; an engine option that the job leaves out does not differ."""
    had = {"precision": manifest.precision} | manifest.capacity
    planned = {"precision": job.options.precision} | vars(job.capacity)
    found = [f"{name} {value}" for name, value in had.items() if name != "rows" and value != planned[name]]
    for name, entry in manifest.engines.items():
        for option in engine_options() if name in job.backends else ():
            wanted = getattr(job.options, option)
            if option in entry and entry[option] != wanted and (wanted or option == "weights"):
                found.append(f"{name} {option} {entry[option] or 'whole'}")
    return found


def is_whole(job: BuildJob, bundle: Bundle) -> bool:
    """Whether every file of the bundle has the content its manifest lists, and the checkpoint's texts are the same."""
    try:
        bundle.check()
    except BundleError:
        return False
    return bundle.manifest.checkpoint.get("texts") == tokenizer.digest(job.checkpoint.directory)


def extended(options: BuildOptions, manifest: Manifest) -> BuildOptions:
    """`options` with the engines that a bundle has, compiled as they were, before those of `options`."""
    assert options.backends is not None
    kept = {
        name: entry[name]
        for entry in manifest.engines.values()
        for name in engine_options()
        if entry.get(name) and not getattr(options, name)
    }
    backends = [*manifest.engines, *(name for name in options.backends if name not in manifest.engines)]
    return replace(options, backends=backends, **kept)


def calibration(root: Path, manifest: Manifest) -> Files:
    """The manifest entry of calibration.json if present and unchanged, else an empty dict."""
    path = root / CALIBRATION
    if path.is_file() and describe(path) == manifest.files.get(CALIBRATION):
        return {CALIBRATION: manifest.files[CALIBRATION]}
    return {}


def prepare(root: Path, keep_manifest: bool) -> None:
    """Make `root` a build's folder and, unless `keep_manifest`, remove the manifest.

    Without a manifest nothing loads until the build has ended. That of a whole
    bundle to which back ends are added is kept until the new one replaces it.
    """
    (root / STAMPS).mkdir(exist_ok=True)
    if not keep_manifest:
        (root / MANIFEST).unlink(missing_ok=True)


def remove_stale(root: Path, files: Files) -> None:
    """Remove what earlier builds left in the folders that builds own: every file there that is not one of `files`."""
    for folder in (root / "onnx", root / STAMPS, *compilers.folders(root)):
        for path in folder.rglob("*") if folder.exists() else ():
            if path.is_file() and path.relative_to(root).as_posix() not in files:
                path.unlink()
