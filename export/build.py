"""Build a bundle: checkpoint -> parts -> engines -> manifest, resumable at every part.

A build writes to a folder of its own in the bundle's, `next/`, and the manifest
last of all; until then what was a bundle before it stays one (`export.swap`).

How often the checkpoint is read: each part's tensors are mapped once, hashed,
and then cast for every file that holds them (`export.part`). From these hashes
come the keys of the stamps and, at the end, the checkpoint's identity, so a new
build and one that goes on after an interruption read every tensor once. Two
cases read more: where a complete bundle lies in the folder, all tensors are read
first to tell whether it is of the same checkpoint, and those of parts that must
be written are read again; and a tied embedding is read for the table and for the
head. No file time or size replaces a hash.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from engines.bundle import STAMPS, Bundle, Manifest
from engines.config import Capacity
from engines.errors import INSTALL, BackendError, BundleError, OptionError
from engines.files import check_space, link, writing
from engines.locks import locked
from engines.record import NEXT, RECORD, SHIPPED
from engines.registry import versions
from engines.signatures import GraphSignature, TensorSpec
from export import folder, stamps, swap
from export.checkpoint import tokenizer
from export.compilers import chosen, compiler
from export.estimate import estimate
from export.job import BuildJob
from export.options import MAX_BATCH, BuildOptions

DEMO = Path(__file__).parent / SHIPPED[0]
Keywords = ParamSpec("Keywords")
Options = TypeVar("Options")
Result = TypeVar("Result")


def takes(options: Callable[Keywords, Options]) -> Callable[[Callable[[Options], Result]], Callable[Keywords, Result]]:
    """Give a function of one options object the keywords of its class, typed."""

    def decorate(function: Callable[[Options], Result]) -> Callable[Keywords, Result]:
        @wraps(function)
        def called(*args: Keywords.args, **kwargs: Keywords.kwargs) -> Result:
            return function(options(*args, **kwargs))

        signature = inspect.signature(options)
        vars(called)["__signature__"] = signature.replace(
            return_annotation=inspect.signature(function).return_annotation
        )
        return called

    return decorate


@takes(BuildOptions)
def build(options: BuildOptions) -> Path:
    """Build the bundle of a Hugging Face checkpoint directory (or "demo") and return its path.

    The keywords are the fields of `export.options.BuildOptions`: `precision` (fp32,
    fp16, bf16), `backends`, `max_length`, `window`, `track_num`, `max_batch`;
    `flavour` (tensorrt, tensorrt_rtx), `capabilities` ("8.9", …) and `compatible`
    (capability, ampere, version) of TensorRT;
    `weights` (int8, int4) of ONNX Runtime; `force`; and `progress`, called as
    progress(what, number, count) before each part is written. Raises CheckpointError, OptionError, BackendError
    where PyTorch or ONNX is not installed, or BundleError (disk, or another bundle
    in the folder without `force`).
    """
    return run(plan(options))


def plan(options: BuildOptions) -> BuildJob:
    """Open the checkpoint and check the options against it; writes nothing. Raises as `build`."""
    options = replace(options, backends=chosen(options.backends))
    options.check()
    try:
        reader = importlib.import_module("export.checkpoint.reader")
        importlib.import_module("export.part")
    except ImportError as error:
        remedy = INSTALL.format(extra="export")
        raise BackendError(f"a build needs {error.name}, which is not installed; {remedy}") from error
    check_compilers(options)
    given = {"mask_token_id": options.mask_id, "eos_token_id": options.eos_id}
    checkpoint = reader.open_checkpoint(
        DEMO.with_name(str(options.checkpoint)) if str(options.checkpoint) in SHIPPED else options.checkpoint,
        {key: number for key, number in given.items() if number is not None},
    )
    limit = checkpoint.config.max_length
    length = min(limit, checkpoint.family.length or limit) if options.max_length is None else options.max_length
    window = min(checkpoint.decoding()["window"], length) if options.window is None else options.window
    for name, value, most in (
        ("max_length", length, limit), ("window", window, length), ("track_num", options.track_num, length),
        ("max_batch", options.max_batch, MAX_BATCH),
    ):  # fmt: skip
        if not 1 <= value <= most:
            raise OptionError(f"{name} must lie in 1 … {most} for this checkpoint, got {value}")
    root = Path(options.out) if options.out is not None else Path("bundles") / checkpoint.directory.name
    if root.resolve() == checkpoint.directory.resolve():
        raise OptionError(f"--out must not be the checkpoint's own folder {checkpoint.directory}")
    config = replace(checkpoint.config, max_length=length)
    capacity = Capacity.of(config, length, window, options.track_num, options.max_batch)
    return BuildJob(options=options, root=root, checkpoint=checkpoint, config=config, capacity=capacity)


def check_compilers(options: BuildOptions) -> None:
    """Raise OptionError or BackendError for what a compiler of `options.backends` cannot do."""
    for name in options.backends or ():
        compiler(name).check(options)


def run(job: BuildJob) -> Path:
    """Build what is planned, unless it is there; returns the bundle's path. Raises BundleError as `build`."""
    need = estimate(job)["disk"]
    remedy = f"a build needs {need / 1e9:.2f} GB in a writable folder (--out), and goes on where it stopped"
    root, force = job.root, job.options.force
    with writing(root, remedy, BundleError):
        if not force and is_up_to_date(job, folder.existing_bundle(job)):
            return root  # without a lock, which a read-only disk refuses
        check_space(root, need - sum(path.stat().st_size for path in root.rglob("*") if path.is_file()))
        root.mkdir(parents=True, exist_ok=True)
        folder.refuse_foreign_files(root, force)
        with locked(root):
            swap.settle(root)
            bundle = None if force else folder.existing_bundle(job)
            if bundle is not None:
                if is_up_to_date(job, bundle):
                    return root
                job = extend(job, bundle)
            swap.publish(root, make(replace(job, root=root / NEXT)))
    return root


def is_up_to_date(job: BuildJob, bundle: Bundle | None) -> bool:
    """Whether there is nothing to build; raises BundleError for the bundle of another checkpoint or other options."""
    if bundle is None:
        return False
    folder.refuse_other_bundle(job, bundle)
    return set(job.backends) <= set(bundle.manifest.engines) and folder.is_whole(job, bundle)


def extend(job: BuildJob, bundle: Bundle) -> BuildJob:
    """The job that also makes a bundle's other engines again and keeps its calibrated defaults."""
    options = folder.extended(job.options, bundle.manifest)
    check_compilers(options)
    kept = folder.calibration(bundle)
    return replace(job, options=options, files=job.files | kept, defaults=bundle.manifest.defaults if kept else None)


def make(job: BuildJob) -> Manifest:
    """Write the record, parts and engines, in this order; returns the manifest."""
    from export.half import HalfPass, probe_ids
    from export.part import Target

    options, config, source = job.options, job.config, job.checkpoint
    texts = source.texts()  # refused before a part is written
    (job.root / STAMPS).mkdir(parents=True, exist_ok=True)
    for path in job.root.iterdir():
        if path.is_file():  # which may be a link to a file of the bundle, from a build that was killed
            path.unlink()
    kept = tuple(job.files)
    for name in kept:
        link(job.root.parent / name, job.root / name)
    job.files[RECORD] = stamps.write(job.root / RECORD, job.record.content())
    target = Target.exported(options.precision, config, job.capacity.track_num)
    if options.precision == "fp16":
        job.half = HalfPass(config, probe_ids(config, texts.get(tokenizer.TOKENIZER)))
    compiling = [compiler(name) for name in job.backends]
    written = job.write_parts(target, *(other for one in compiling for other in one.targets(job)))
    job.parts = {signature.name: written[signature.name] | tensors(signature) for signature in target.signatures}
    for name, content in texts.items():
        job.files[name] = stamps.write(job.root / name, content)
    entries = {name: entry for name, entry in job.files.items() if "/" not in name and name not in kept}
    job.files |= stamps.stamp(job.root, list(entries), "texts", entries)
    engines = {one.name: one.compile(job) for one in compiling}
    decoding = source.decoding()
    defaults = decoding | {"window": min(decoding["window"], job.capacity.window)}
    return Manifest(
        model=config.to_json(),
        capacity=dict(vars(job.capacity)),
        precision=options.precision,
        defaults=defaults if job.defaults is None else job.defaults,
        parts=job.parts,
        engines=engines,
        checkpoint={
            "name": source.directory.name,
            "identity": source.identity,
            "texts": tokenizer.digest(source.directory),
        },
        tools=versions(),
        files=job.files,
    )


def tensors(signature: GraphSignature) -> dict[str, Any]:
    """The manifest's description of a graph's inputs, outputs and aliases."""

    def entry(tensor: TensorSpec) -> dict[str, Any]:
        return {"name": tensor.name, "dtype": tensor.dtype, "axes": list(tensor.axes)}

    return {
        "inputs": list(map(entry, signature.inputs)),
        "outputs": list(map(entry, signature.outputs)),
        "aliases": dict(signature.aliases),
    }
