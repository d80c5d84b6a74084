"""The folder a bundle is built in.

What is here reads what lies there and changes nothing; `export.swap` makes a
finished build the bundle.
"""

from dataclasses import replace
from pathlib import Path, PurePosixPath

from engines.bundle import MANIFEST, STAMPS, Bundle, Manifest, inside
from engines.defaults import calibrations
from engines.errors import BundleError, NewerBundleError
from engines.files import describe
from engines.locks import LOCK
from engines.record import NEXT, read_record, rebuild
from export.checkpoint import tokenizer
from export.job import BuildJob
from export.options import BuildOptions, engine_options
from export.stamps import Files
from export.swap import owned

WRITTEN = {MANIFEST, STAMPS, NEXT, "onnx", "engines", "config.json", *tokenizer.FILES}  # names that a build may use


def existing_bundle(job: BuildJob) -> Bundle | None:
    """The bundle in the job's folder; None for an empty folder, an unfinished build, a damaged bundle or an older one.

    Raises NewerBundleError for a bundle of a later version, BundleError for other
    files and for what is left of the bundle of another checkpoint.
    """
    root = job.root
    try:
        return Bundle.open(root)
    except NewerBundleError:
        raise
    except BundleError:
        if not root.is_dir():
            return None
        refuse_foreign_files(root, force=False)
        record = read_record(root)
        if record and record.checkpoint != job.record.checkpoint:
            raise BundleError(
                f"{root} is a damaged bundle of {record.checkpoint}; {rebuild(root)}, or pass --force to replace it"
            ) from None
        return None


def refuse_foreign_files(root: Path, force: bool) -> None:
    """Raise BundleError for files that no build wrote: with `force` for those in the way alone."""
    own = {LOCK, MANIFEST + ".tmp", *(PurePosixPath(name).parts[0] for name in owned(root))}
    if (root / NEXT / STAMPS).is_dir() or ((root / NEXT).is_dir() and not any((root / NEXT).iterdir())):
        own.add(NEXT)
    found = {path.name for path in root.iterdir()}
    foreign = sorted(found - own - set(calibrations(found)))
    in_the_way = sorted(WRITTEN & set(foreign))
    if in_the_way:
        raise BundleError(f"{root} holds {in_the_way[0]}, which no build wrote; choose an empty --out")
    if foreign and not force:
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
                found.append(f"{name} {option} {entry[option] or ('whole' if option == 'weights' else 'none')}")
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


def calibration(bundle: Bundle) -> Files:
    """The entry of the file that a bundle's calibrated defaults rest on, if it is there and unchanged; else nothing."""
    files, folder = bundle.manifest.files, bundle.manifest.folder
    paths = {name: inside(bundle.root, name, folder) for name in calibrations(files)}
    return {name: files[name] for name, path in paths.items() if path.is_file() and describe(path) == files[name]}
