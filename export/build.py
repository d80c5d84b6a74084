"""Build a bundle: checkpoint -> parts -> engines -> manifest, resumable at every part.

While a build runs the bundle has no manifest and does not load; the manifest is
the last file written. What reads checkpoints and writes graphs is imported when
a build begins: it takes seconds, and may not be installed. Nothing here knows
graphs, families or decoding.
"""

import importlib
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.bundle import STAMPS, Manifest, write_manifest
from engines.config import PRECISIONS, Capacity, ModelConfig
from engines.errors import INSTALL, BackendError, BundleError, OptionError
from engines.files import describe
from engines.registry import versions
from engines.signatures import GraphSignature, TensorSpec
from engines.signatures.gpu import gpu_signatures
from engines.signatures.vision import vision_signatures
from engines.weights import SIZES
from export.checkpoint import tokenizer
from export.compilers import COMPILERS, check_options, chosen, engine_bytes
from export.folder import locked, prepare_folder, refuse_foreign_files, remove_stale

if TYPE_CHECKING:
    from export.checkpoint.reader import Checkpoint
    from export.part import Target

DEMO = Path(__file__).parent / "demo"
DEFAULTS = {"policy": "elastic", "threshold": 0.9, "gamma": 0.9, "drift": "row", "track_num": 1}
Progress = Callable[[str, int, int], None]  # what is being made, its number, of how many


@dataclass
class BuildJob:
    """One build under way: its inputs, and the parts made so far."""

    root: Path
    checkpoint: "Checkpoint"
    config: ModelConfig
    capacity: Capacity
    precision: str
    backends: list[str]
    flavour: str | None = None  # of TensorRT
    capabilities: list[str] | None = None  # that TensorRT compiles for
    weights: str | None = None  # what ONNX Runtime's matrices are quantised to
    progress: Progress = lambda *_: None
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    defaults: dict[str, Any] | None = None  # of a calibrated bundle that is built upon

    def write_parts(self, target: "Target", signatures: tuple[GraphSignature, ...]) -> dict[str, dict[str, Any]]:
        """Write parts to `target`; returns {part: {"graph", "weights"}}."""
        from export.part import write_part

        written = {}
        for number, signature in enumerate(signatures, 1):
            self.progress(f"{target.folder}/{signature.name}", number, len(signatures))
            load = partial(self.checkpoint.part, signature.name)
            made = write_part(target, signature, self.config, self.checkpoint.identity, load)
            self.files |= made["files"]
            written[signature.name] = {"graph": made["graph"], "weights": made["weights"]}
        return written


def build(
    checkpoint: str | Path = "demo",
    out: str | Path | None = None,
    precision: str = "fp32",
    backends: list[str] | None = None,
    max_length: int | None = None,
    window: int | None = None,
    track_num: int = 1,
    max_batch: int = 16,
    flavour: str | None = None,
    capabilities: list[str] | None = None,
    weights: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Build the bundle of a Hugging Face checkpoint directory (or "demo") and return its path.

    `precision` is the element type of the exported graphs: fp32, fp16 or bf16.
    `flavour` (tensorrt, tensorrt_rtx) and `capabilities` ("8.9", …) are TensorRT's,
    `weights` (int8, int4) quantises ONNX Runtime's matrices.
    Raises CheckpointError, OptionError, BackendError where PyTorch or ONNX is not
    installed, or BundleError (disk, or another bundle in the way without `force`).
    """
    job = plan(
        checkpoint, out, precision, backends, max_length, window, track_num, max_batch, flavour, capabilities, weights
    )
    job.progress = progress or job.progress
    try:
        job.root.mkdir(parents=True, exist_ok=True)
        if not force and not (job.root / STAMPS).is_dir():
            refuse_foreign_files(job.root)  # before a lock is left among their files
        with locked(job.root):
            if prepare_folder(job, force):
                run(job)
    except OSError as error:
        need = estimate(job)["disk"] / 1e9
        raise BundleError(
            f"cannot write the bundle at {job.root}: {error.strerror or error}; it needs {need:.2f} GB in a writable "
            "folder (--out), and the build goes on where it stopped"
        ) from error
    return job.root


def plan(
    checkpoint: str | Path,
    out: str | Path | None,
    precision: str,
    backends: list[str] | None,
    max_length: int | None,
    window: int | None,
    track_num: int,
    max_batch: int,
    flavour: str | None = None,
    capabilities: list[str] | None = None,
    weights: str | None = None,
) -> BuildJob:
    """Check the options against the checkpoint; nothing is written."""
    if precision not in PRECISIONS:
        raise OptionError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    names = chosen(backends)
    check_options(names, precision, weights, flavour, capabilities)
    try:
        open_checkpoint = importlib.import_module("export.checkpoint.reader").open_checkpoint
        importlib.import_module("export.part")
    except ImportError as error:
        remedy = INSTALL.format(extra="export")
        raise BackendError(f"a build needs {error.name}, which is not installed; {remedy}") from error
    source: Checkpoint = open_checkpoint(DEMO if str(checkpoint) == "demo" else checkpoint)
    limit = source.config.max_length
    length = min(limit, source.family.length or limit) if max_length is None else max_length
    if window is None:
        window = min(source.decoding()["window"], length)
    for option, value, top in (
        ("max_length", length, limit), ("window", window, length), ("track_num", track_num, length),
        ("max_batch", max_batch, 1024),
    ):  # fmt: skip
        if not 1 <= value <= top:
            raise OptionError(f"{option} must lie in 1 … {top} for this checkpoint, got {value}")
    root = Path(out) if out is not None else Path("bundles") / source.directory.name
    if root.resolve() == source.directory.resolve():
        raise OptionError(f"--out must not be the checkpoint's own folder {source.directory}")
    config = replace(source.config, max_length=length)
    capacity = Capacity.of(config, length, window, track_num, max_batch)
    return BuildJob(root, source, config, capacity, precision, names, flavour, capabilities, weights)


def run(job: BuildJob) -> None:
    """Make parts, engines and manifest, in this order."""
    from export.part import Target

    if tokenizer.needs_writing(job.checkpoint.directory):
        path = job.root / tokenizer.TOKENIZER
        tokenizer.write_tokenizer(job.checkpoint.directory, job.checkpoint.family.split, path)
        job.files[path.name] = describe(path)
    folder = Target(job.root, "onnx", job.precision, job.precision)
    signatures = (
        *gpu_signatures(job.config, job.precision, job.capacity.track_num),
        *vision_signatures(job.config, job.precision),
    )
    written = job.write_parts(folder, signatures)
    job.parts = {signature.name: written[signature.name] | ports(signature) for signature in signatures}
    for source in (job.checkpoint.directory / "config.json", *job.checkpoint.tokenizer_files()):
        shutil.copyfile(source, job.root / source.name)
        job.files[source.name] = describe(job.root / source.name)
    engines = {name: COMPILERS[name](job) for name in job.backends}
    remove_stale(job)
    decoding = job.checkpoint.decoding()
    defaults = DEFAULTS | decoding | {"window": min(decoding["window"], job.capacity.window)}
    write_manifest(
        job.root,
        Manifest(
            model=job.config.to_json(), capacity=dict(vars(job.capacity)), precision=job.precision,
            defaults=defaults if job.defaults is None else job.defaults,
            parts=job.parts, engines=engines, tools=versions(), files=job.files,
            checkpoint={"name": job.checkpoint.directory.name, "identity": job.checkpoint.identity},
        ),
    )  # fmt: skip


def ports(signature: GraphSignature) -> dict[str, Any]:
    """The manifest's description of a part's ports."""

    def describe_port(port: TensorSpec) -> dict[str, Any]:
        return {"name": port.name, "dtype": port.dtype, "axes": list(port.axes)}

    return {
        "inputs": list(map(describe_port, signature.inputs)),
        "outputs": list(map(describe_port, signature.outputs)),
        "aliases": dict(signature.aliases),
    }


def estimate(job: BuildJob) -> dict[str, int]:
    """Bytes on disk and the peak of memory a build needs, from the shapes alone."""
    c = job.config
    table = c.vocab * c.d_model
    numbers = 2 * table + c.layers * c.layer_numbers
    of_vision = [job.checkpoint.family.weights(c, part).values() for part in c.vision_parts]
    seen = sum(math.prod(weight.shape) for part in of_vision for weight in part)
    engines = engine_bytes(job.backends, job.precision, job.weights, table, numbers, seen)
    return {"disk": (numbers + seen) * SIZES[job.precision] + engines, "memory": 2 * max(c.layer_numbers, table) * 4}
