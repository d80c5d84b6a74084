"""Compiling parts to TensorRT engines, ahead of time where the flavour can.

Weights are inputs of the engines, not constants: all layers of one shape share
one plan, and each layer's weights lie on the GPU once for all its profiles and
lengths. Caches need static lengths, so there is a plan for each of a few
lengths; a profile fixes the rows of a reuse pass and of a whole pass. Nothing
here knows checkpoints or decoding.
"""

import hashlib
import inspect
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import onnx

from engines.config import Capacity
from engines.errors import BackendError, OptionError
from engines.signatures import GraphSignature
from engines.signatures.gpu import gpu_signatures
from engines.signatures.vision import vision_signatures
from engines.trt.package import CURRENT, TensorRTPackage, find
from export.compilers import Compiler
from export.job import BuildJob, Sizes
from export.options import BuildOptions
from export.stamps import kept, write

FOLDER = "engines/tensorrt"
CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")  # built for ahead of time unless told otherwise
USUAL_TILES = 7  # of a photo
SHORTEST = 512  # positions of the shortest engines
NATIVE = {"layer": ("ROTARY_EMBEDDING", "KV_CACHE_UPDATE", "ATTENTION_INPUT"), "tower": ("ATTENTION_INPUT",)}
Span = tuple[int, int, int]  # least, usual and most of a dynamic axis


def compile_plans(build: BuildJob) -> dict[str, Any]:
    """One plan for each distinct part and length; see `engines.trt.model` for how they are run.

    Raises OptionError for fp32 and for an unknown compute capability,
    BackendError where TensorRT is missing, fails, or takes attention apart.
    """
    check_precision(build.options.precision)
    flavour = find(build.options.flavour)
    capabilities = targets(flavour, build.options.capabilities)
    slots = lengths(build.capacity)
    parts: dict[str, Any] = {}
    made: dict[str, dict[str, Any]] = {}  # by what a plan is made from: layers of one shape are compiled once
    config = build.config
    signatures = (
        *gpu_signatures(config, build.options.precision, build.capacity.track_num),
        *vision_signatures(config, build.options.precision),
    )
    tiles = config.vision.tiles if config.vision else 1
    for number, signature in enumerate(signatures, 1):
        build.progress(f"{FOLDER}/{signature.name}", number, len(signatures))
        source = build.parts[signature.name]
        plans = {}
        for count in slots:
            model = prepare(build.root / source["graph"], count)
            chosen = profiles(signature, build.capacity, count, tiles)
            key = digest(model, chosen, flavour, capabilities)
            if key not in made:
                made[key] = compile_plan(build, f"{signature.name}_{count}", key, model, chosen, flavour, capabilities)
            plans[str(count)] = made[key]["plan"]
        layers = made[key]["layers"]
        parts[signature.name] = {"plans": plans, "weights": source["weights"], "layers": layers}
    return {
        "precision": build.options.precision, "flavour": flavour.name, "version": flavour.version,
        "capabilities": capabilities, "slots": slots, "parts": parts,
        "profiles": {s.name: [{k: list(v) for k, v in p.items()} for p in profiles(s, build.capacity, slots[-1], tiles)]
                     for s in signatures},
    }  # fmt: skip


def check_precision(precision: str) -> None:
    """Raises OptionError for a precision without native attention."""
    if precision == "fp32":
        raise OptionError(
            "TensorRT has no fused attention in fp32: pass --fp16 or --bf16, or compile with --backend onnxruntime"
        )


def targets(flavour: TensorRTPackage, capabilities: list[str] | None) -> list[str]:
    """The compute capabilities to compile for; ["current"] where the flavour compiles for the GPU at hand."""
    if not flavour.ahead_of_time:
        if capabilities not in (None, [], [CURRENT]):
            raise OptionError(f"{flavour.name} compiles for the GPU at hand; leave --capability out")
        return [CURRENT]
    names = list(dict.fromkeys(capabilities or CAPABILITIES))
    for name in names:
        flavour.capability(name)
    return names


def lengths(capacity: Capacity) -> list[int]:
    """Slots of the engines: positions 512, 1024, … up to the bundle's length, and a reuse pass's dummies."""
    positions = [capacity.max_length]
    size = SHORTEST
    while size < capacity.max_length:
        positions.append(size)
        size *= 2
    return [count + capacity.rows for count in sorted(positions)]


def profiles(signature: GraphSignature, capacity: Capacity, slots: int, tiles: int = 1) -> list[dict[str, Span]]:
    """The spans of a part's dynamic axes in each profile: reuse, whole, general (those the part has).

    Only a reuse pass is run for several sequences at once. Parts that see images have one profile, up to the
    `tiles` of the largest tiling.
    """
    rows, window = capacity.rows, capacity.window
    several, one = {"B": (1, 1, capacity.max_batch)}, {"B": (1, 1, 1)}

    def fixed(value: int) -> Span:
        return value, value, value

    kind = signature.name.partition("_")[0]
    any_rows = 1, rows, slots
    if kind in ("tower", "projector"):
        return [{"N": (1, min(USUAL_TILES, tiles), tiles)}]
    if kind in ("embed", "layer"):
        return [several | {"A": fixed(rows)}, one | {"A": fixed(slots)}, one | {"A": any_rows}]
    if kind == "head":
        return [several | {"A": fixed(slots), "W": fixed(window)}, one | {"A": fixed(slots), "W": fixed(rows)}]
    if kind == "drift":
        return [several | {"A": fixed(rows), "T": fixed(rows)}, one | {"A": any_rows, "T": any_rows}]
    return [several | {"W": fixed(rows)}, one | {"W": any_rows}]


def prepare(path: Any, slots: int) -> onnx.ModelProto:
    """A part's graph with `slots` static and its weights as inputs."""
    model = onnx.load(str(path), load_external_data=False)
    graph = model.graph
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "S":
                dim.dim_value = slots
    stored = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in stored:
        graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        graph.initializer.remove(tensor)
    graph.name = graph.name.partition("_")[0]  # layers of one shape are the same graph
    return model


def digest(
    model: onnx.ModelProto, spans: list[dict[str, Span]], flavour: TensorRTPackage, capabilities: list[str]
) -> str:
    """Names what a plan is made from: graph, profiles, compiler and targets."""
    code = inspect.getsource(sys.modules[__name__])
    content = hashlib.sha256(model.SerializeToString(deterministic=True))
    content.update(json.dumps([spans, flavour.name, flavour.version, capabilities, code]).encode())
    return content.hexdigest()


def compile_plan(
    build: BuildJob, name: str, key: str, model: onnx.ModelProto, spans: list[dict[str, Span]],
    flavour: TensorRTPackage, capabilities: list[str],
) -> dict[str, Any]:  # fmt: skip
    """Write one plan unless its stamp says it is there; returns its file and its network's layers by kind."""
    plan, notes = f"{FOLDER}/{name}.plan", f"{FOLDER}/{name}.json"
    (build.root / FOLDER).mkdir(parents=True, exist_ok=True)

    def make() -> dict[str, dict[str, Any]]:
        content, layers = serialize(name, model, spans, flavour, capabilities)
        return {plan: write(build.root / plan, content), notes: write(build.root / notes, json.dumps(layers).encode())}

    build.files |= kept(build.root, [plan, notes], key, make)
    return {"plan": plan, "layers": json.loads((build.root / notes).read_bytes())}


def serialize(
    name: str, model: onnx.ModelProto, spans: list[dict[str, Span]], flavour: TensorRTPackage, capabilities: list[str]
) -> tuple[bytes, dict[str, int]]:  # fmt: skip
    """Parse, check that native layers stayed whole, and build; returns the plan and the layers by kind."""
    trt = flavour.module
    messages = Messages(trt)
    builder = trt.Builder(messages.logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # the only kind from version 11 on
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, messages.logger)
    if not parser.parse(model.SerializeToString()):
        reasons = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise BackendError(f"{flavour.name} {flavour.version} cannot read {name}: {reasons}; try another version")
    kinds = dict(Counter(network.get_layer(i).type.name for i in range(network.num_layers)))
    missing = [kind for kind in NATIVE.get(name.partition("_")[0], ()) if kind not in kinds]
    if missing:
        raise BackendError(
            f"{flavour.name} {flavour.version} took {', '.join(missing)} of {name} apart; "
            "its engine would be slow: update TensorRT, or use --backend onnxruntime"
        )
    config = builder.create_builder_config()
    if flavour.ahead_of_time:
        config.num_compute_capabilities = len(capabilities)
        for number, capability in enumerate(capabilities):
            config.set_compute_capability(flavour.capability(capability), number)
    axes = {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in model.graph.input}  # fmt: skip
    for span in spans:
        profile = builder.create_optimization_profile()
        for port, dims in shapes(axes, span):
            profile.set_shape(port, *dims)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = messages.last.partition(" (See")[0] or "no reason given"
        raise BackendError(
            f"{flavour.name} {flavour.version} cannot build {name} for {', '.join(capabilities)}: {reason}; "
            "choose another --capability, or use --backend onnxruntime"
        )
    return bytes(plan), kinds


def shapes(axes: dict[str, list[Any]], spans: dict[str, Span]) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """(input, [least, usual and most shape]) of the inputs with a dynamic axis."""
    for port, dims in axes.items():
        if any(isinstance(dim, str) for dim in dims):
            yield port, [tuple(spans[d][i] if isinstance(d, str) else d for d in dims) for i in range(3)]


class Messages:
    """Keeps the last error a TensorRT logger was told, and prints nothing."""

    def __init__(self, trt: Any):
        self.last = ""
        keep: Callable[[str], None] = lambda text: setattr(self, "last", text)  # noqa: E731

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()

            def log(self, severity: Any, text: str) -> None:
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    keep(text.strip())

        self.logger = Logger()


class TensorRTCompiler(Compiler):
    """Plans for NVIDIA GPUs."""

    name = "tensorrt"

    def check(self, options: BuildOptions) -> None:
        check_precision(options.precision)
        targets(find(options.flavour), options.capabilities)

    def engine_bytes(self, sizes: Sizes) -> int:
        return 0  # plans hold no weights

    def compile(self, job: BuildJob) -> dict[str, Any]:
        return compile_plans(job)


COMPILER = TensorRTCompiler()
