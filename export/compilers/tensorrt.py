"""Compiles exported parts to TensorRT engines ("plans"), ahead of time where the package can.

Weights are inputs of an engine, not constants: all layers of one shape share one
plan, and the weights of each layer lie on the GPU once for all profiles and
lengths. Caches need static lengths, so there is a plan for each of a few
lengths; a profile fixes the rows of a reuse pass or of a full pass.
"""

import hashlib
import inspect
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import onnx

from engines.config import Capacity
from engines.errors import BackendError, OptionError
from engines.signatures import GraphSignature
from engines.signatures.gpu import gpu_signatures
from engines.signatures.vision import vision_signatures
from engines.trt.package import CURRENT, LEVELS, OLDEST, VERSION, TensorRTPackage, find
from export import stamps
from export.compilers import Compiler, tensorrt_engine
from export.compilers.tensorrt_engine import Span, Spans, build_engine, polygraphy_for
from export.graphs import weights_to_inputs
from export.job import BuildJob
from export.options import BuildOptions

FOLDER = "engines/tensorrt"
CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")  # compute capabilities that an ahead-of-time build is for by default
TYPICAL_TILES = 7  # of a photo
PLANS = 11_800_000  # bytes of all plans of one length: 11.5 to 12.1 MB with TensorRT for RTX 1.7
SHORTEST = 512  # positions of the shortest engines
GRAIN = 16  # slots: 256 bytes of keys for every head of 8 elements and more
NATIVE = {"layer": ("ROTARY_EMBEDDING", "KV_CACHE_UPDATE", "ATTENTION_INPUT"), "tower": ("ATTENTION_INPUT",)}


class TensorRTCompiler(Compiler):
    """One plan for each distinct graph and length; `engines.trt.model` runs them."""

    name = "tensorrt"

    def check(self, options: BuildOptions) -> None:
        """Raise OptionError for a precision, compute capability or compatibility that cannot be built, BackendError for
        a package that is missing or too old, or finds no GPU and needs one."""
        check_precision(options.precision)
        package = find(options.flavour)
        targets(package, options.capabilities)
        check_package(package, options.compatible or [])
        polygraphy_for(package)

    def engine_bytes(self, job: BuildJob) -> int:
        """Plans hold no weights: those of a length have one size for models of all widths and any capabilities."""
        return len(lengths(job.capacity)) * PLANS

    def compile(self, job: BuildJob) -> dict[str, Any]:
        """Write the plans of all parts and lengths; returns the manifest's entry.

        Raises BackendError where TensorRT cannot build a part.
        """
        options, config, capacity = job.options, job.config, job.capacity
        package = find(options.flavour)
        capabilities, compatible = targets(package, options.capabilities), list(options.compatible or [])
        slots = lengths(capacity)
        tiles = config.vision.tiles if config.vision else 1
        signatures = (
            *gpu_signatures(config, options.precision, capacity.track_num),
            *vision_signatures(config, options.precision),
        )
        plans: dict[str, tuple[str, dict[str, int]]] = {}  # key -> (plan's file, layers by kind)
        parts: dict[str, Any] = {}
        for number, signature in enumerate(signatures, 1):
            job.progress(f"{FOLDER}/{signature.name}", number, len(signatures))
            source = job.parts[signature.name]
            files = {}
            for count in slots:
                model = with_weights_as_inputs(job.root / source["graph"], count)
                spans = profiles(signature, capacity, count, tiles)
                key = plan_key(model, spans, package, capabilities, compatible)
                if key not in plans:
                    name = f"{signature.name}_{count}"
                    plans[key] = write_plan(job, name, key, model, spans, package, capabilities, compatible)
                files[str(count)], layers = plans[key]
            parts[signature.name] = {"plans": files, "weights": source["weights"], "layers": layers}
        return {
            "precision": options.precision,
            "flavour": package.name,
            "version": package.version,
            "capabilities": capabilities,
            "compatible": compatible,
            "slots": slots,
            "parts": parts,
            "profiles": {
                signature.name: [
                    {axis: list(span) for axis, span in spans.items()}
                    for spans in profiles(signature, capacity, slots[-1], tiles)
                ]
                for signature in signatures
            },
        }


COMPILER = TensorRTCompiler()


def check_precision(precision: str) -> None:
    """Raise OptionError for a precision in which TensorRT has no fused attention."""
    if precision == "fp32":
        raise OptionError(
            "TensorRT has no fused attention in fp32: pass --fp16 or --bf16, or compile with --backend onnxruntime"
        )


def targets(package: TensorRTPackage, capabilities: list[str] | None) -> list[str]:
    """The compute capabilities to compile for; ["current"] where the package compiles for the GPU of this machine.

    Raises OptionError for capabilities that the package cannot compile for.
    """
    if not package.ahead_of_time:
        if capabilities not in (None, [], [CURRENT]):
            raise OptionError(f"{package.name} compiles for the GPU of this machine; leave --capability out")
        return [CURRENT]
    names = list(dict.fromkeys(capabilities or CAPABILITIES))
    for name in names:
        package.capability(name)
    if CURRENT in names and len(names) > 1:
        raise OptionError(f"{package.name} compiles for {CURRENT} alone; leave --capability {CURRENT} out, or the rest")
    return names


def check_package(package: TensorRTPackage, compatible: list[str]) -> None:
    """Raise OptionError for a compatibility that `package` does not have, BackendError where it cannot build here."""
    if compatible and package.ahead_of_time:
        raise OptionError(
            f"{package.name} compiles for compute capabilities; leave --compatible out, or name GPUs with --capability"
        )
    unknown = [kind for kind in compatible if kind not in (*LEVELS, VERSION)]
    if unknown or set(LEVELS) <= set(compatible):
        raise OptionError(
            f"compatible must be one of {', '.join(LEVELS)}, and {VERSION}, got {', '.join(compatible)}; leave one out"
        )
    if package.too_old:
        raise BackendError(
            f"{package.name} {package.version} lacks layers that the engines need and {OLDEST[package.name]} has; "
            f"`pip install '{package.name}>={OLDEST[package.name]}'`"
        )
    if not package.ahead_of_time:
        try:
            package.module.Builder(package.module.Logger(package.module.Logger.INTERNAL_ERROR))
        except TypeError as error:  # what its binding makes of a builder that cannot be created
            raise BackendError(
                f"{package.name} {package.version} compiles for the GPU of this machine and finds none ({error}); "
                "build where the engines will run, or with --flavour tensorrt_rtx"
            ) from error


def lengths(capacity: Capacity) -> list[int]:
    """Slots S of the engines: positions 512, 1024, … and the bundle's length, each plus the R rows of a reuse pass.

    They are rounded up, so that the caches of a sequence begin at aligned addresses: TensorRT asks for 256 bytes.
    """
    positions = [capacity.max_length]
    size = SHORTEST
    while size < capacity.max_length:
        positions.append(size)
        size *= 2
    return [-(-(count + capacity.rows) // GRAIN) * GRAIN for count in sorted(positions)]


def profiles(signature: GraphSignature, capacity: Capacity, slots: int, tiles: int = 1) -> list[Spans]:
    """The spans of a part's dynamic axes in each of its profiles: reuse, full, general.

    Only a reuse pass runs several sequences at once. Vision parts have one
    profile, up to the `tiles` of the largest tiling.
    """
    rows, window = capacity.rows, capacity.window
    several: Spans = {"B": (1, 1, capacity.max_batch)}
    one: Spans = {"B": (1, 1, 1)}

    def fixed(value: int) -> Span:
        return value, value, value

    kind = signature.name.partition("_")[0]
    any_rows = 1, rows, slots
    if kind in ("tower", "projector"):
        return [{"N": (1, min(TYPICAL_TILES, tiles), tiles)}]
    if kind in ("embed", "layer"):
        return [several | {"A": fixed(rows)}, one | {"A": fixed(slots)}, one | {"A": any_rows}]
    if kind == "head":
        return [several | {"A": fixed(slots), "W": fixed(window)}, one | {"A": fixed(slots), "W": fixed(rows)}]
    if kind == "tests":
        return [several | {"A": fixed(rows), "T": fixed(rows)}, one | {"A": any_rows, "T": fixed(rows)}]
    return [several | {"W": fixed(rows)}]


def with_weights_as_inputs(path: Path, slots: int) -> onnx.ModelProto:
    """The graph at `path` with `slots` slots and its external weights as inputs."""
    model = onnx.load(str(path), load_external_data=False)
    fix_slots(model, slots)
    weights_to_inputs(model)
    model.graph.name = model.graph.name.partition("_")[0]  # the graphs of layers of one shape are equal
    return model


def fix_slots(model: onnx.ModelProto, slots: int) -> None:
    """Make the axis S of the inputs and outputs static: caches need a static length."""
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "S":
                dim.dim_value = slots


def plan_key(model: onnx.ModelProto, spans: list[Spans], package: TensorRTPackage, *made_for: list[str]) -> str:
    """Everything a plan is made from: graph, profiles, TensorRT, what it is for and this code."""
    graph = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    return json.dumps([graph, spans, package.name, package.version, made_for, code()])


@cache
def code() -> str:
    """SHA-256 of the code that makes plans; a change of it makes all stamps of plans invalid."""
    sources = map(inspect.getsource, (sys.modules[__name__], tensorrt_engine))
    return hashlib.sha256("".join(sources).encode()).hexdigest()


def write_plan(
    job: BuildJob, name: str, key: str, model: onnx.ModelProto, spans: list[Spans], package: TensorRTPackage,
    capabilities: list[str], compatible: list[str],
) -> tuple[str, dict[str, int]]:  # fmt: skip
    """Write a plan and its network's layers by kind, unless both are up to date; returns the plan's file and these."""
    plan, kinds = f"{FOLDER}/{name}.plan", f"{FOLDER}/{name}.json"

    def make() -> stamps.Files:
        native = NATIVE.get(name.partition("_")[0], ())
        content, layers = build_engine(package, name, model, spans, capabilities, native, compatible)
        contents = {plan: content, kinds: json.dumps(layers).encode()}
        return {file: stamps.write(job.root / file, written) for file, written in contents.items()}

    (job.root / FOLDER).mkdir(parents=True, exist_ok=True)
    job.files |= stamps.kept(job.root, [plan, kinds], key, make)
    return plan, json.loads((job.root / kinds).read_bytes())
