"""What TensorRT's compiler makes of the parts, from its own log: kernels, copies, streams and scratch of each profile.

    python -m scripts.kernels --shape llada-8b --length 1024 --length 4096 --out kernels.json

Builds ahead of time with tensorrt-rtx, without a GPU and without weights, which are inputs. A kernel that only moves
numbers (its name has nothing but reshapes, transposes, casts and the like) counts as a copy of what it
writes. The time of a step is estimated from these figures (`step_seconds`), not measured.
"""

import argparse
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from engines.config import Capacity, ModelConfig
from engines.signatures import GraphSignature
from engines.signatures.gpu import gpu_signatures
from engines.trt.package import TensorRTPackage, find
from engines.weights import Entry
from export import graphs
from export.checkpoint.families.llada import FAMILY
from export.compilers import tensorrt
from scripts.experiments.make_random_checkpoint import COMMON, SHAPES

KERNEL = re.compile(
    r"^Name: (\S+).*?, LayerType: (\w+), Inputs: (.*?), Outputs: (\[.*?\]), TacticName: .*?StreamId: (\d+)"
)
TENSOR = re.compile(r"Name: (.*?), Dimensions: \[([-\d,]*)\].*?Datatype: (\w+)")
SCRATCH = re.compile(r"Max Scratch Memory: (\d+) bytes")
MOVES = re.compile(r"_*myl_(?:Move|Resh|Tran|Slic|Conc|Repl|Cast|Etc)+_myl\d+_\d+$")  # parts of the name of a kernel
NOT_RUN = {"shape_call", "signal", "wait"}  # on the host, or between streams
BYTES = {"Half": 2, "BFloat16": 2, "Float": 4, "Int32": 4, "Int64": 8, "Bool": 1, "Int8": 1, "UInt8": 1}
GPUS = {  # bytes a second of the data sheets; seconds from one kernel of a graph to the next, a guess
    "H100 SXM": (3.35e12, 1.7e-6), "RTX 4090": (1.008e12, 1.4e-6), "Jetson AGX Orin": (2.048e11, 4.3e-6),
}  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """One profile of a part: its kernels by type, what its copies write, and its scratch memory, in bytes."""

    part: str
    slots: int
    profile: int
    kernels: int
    products: int
    copies: int
    copied: int
    streams: int
    scratch: int
    plan: int  # of the part, all profiles


def part_model(config: ModelConfig, signature: GraphSignature, dtype: str, slots: int) -> onnx.ModelProto:
    """The graph of a part with its weights as inputs; no weight is read."""
    entries = {}
    if signature.name in config.parts:
        for name, weight in FAMILY.weights(config, signature.name).items():
            shape = tuple(reversed(weight.shape)) if weight.transposed else weight.shape
            entries[name] = Entry(dtype, shape, 0, 0)
    model = graphs.build(signature, config, dtype, {signature.name: (entries, "")} if entries else {})
    tensorrt.fix_slots(model, slots)
    graphs.weights_to_inputs(model)
    return model


def compile_part(
    package: TensorRTPackage, model: onnx.ModelProto, profiles: list[Any], capability: str
) -> tuple[list[str], int]:
    """Build a plan with TensorRT's own API, for its detailed log; returns the log's lines and the plan's bytes."""
    trt = package.module
    lines: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            lines.extend(message.splitlines())

    logger = Log()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        raise SystemExit(f"error: TensorRT cannot read the part: {parser.get_error(0)}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.max_aux_streams = 0
    config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    for spans in profiles:
        profile = builder.create_optimization_profile()
        for value in model.graph.input:
            axes = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            if any(isinstance(axis, str) for axis in axes):
                sizes = (tuple(spans[a][i] if isinstance(a, str) else a for a in axes) for i in range(3))
                profile.set_shape(value.name, *sizes)
        config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(package.capability(capability), 0)
    return lines, len(bytes(builder.build_serialized_network(network, config)))


def read_log(part: str, slots: int, lines: list[str], plan: int) -> Iterator[Profile]:
    """The profiles of a part, from the log of its build."""
    scratch = [int(found[1]) for line in lines if (found := SCRATCH.search(line))]
    rows = [found.groups() for line in lines if (found := KERNEL.match(line)) and found[2] not in NOT_RUN]
    for index, size in enumerate(scratch):
        mine = [row for row in rows if re.search(rf"_myl{index}_\d+$", row[0])]
        moves = [row for row in mine if MOVES.match(row[0])]
        yield Profile(
            part=part, slots=slots, profile=index, kernels=len(mine), scratch=size, plan=plan,
            products=sum(row[1] == "gemm" or "Fc" in row[0] or "mha" in row[0] for row in mine), copies=len(moves),
            copied=sum(map(written, moves)), streams=len({row[4] for row in mine}),
        )  # fmt: skip


def written(row: tuple[str, ...]) -> int:
    """The bytes of a kernel's outputs; an axis that is dynamic counts as 1."""
    return sum(
        math.prod(max(1, int(size)) for size in dims.split(",") if size) * BYTES.get(kind, 4)
        for _, dims, kind in TENSOR.findall(row[3])
    )


def figures(config: ModelConfig, window: int, dtype: str, capability: str, package: TensorRTPackage) -> list[Profile]:
    """Every profile of every kind of part, for the longest slots of the config's length."""
    capacity = Capacity.of(config, config.max_length, window, 1, 1)
    slots, found, seen = tensorrt.lengths(capacity)[-1], [], set[str]()
    for signature in gpu_signatures(config, dtype, 1):
        kind = signature.name.partition("_")[0] if signature.name in config.parts else signature.name
        if kind not in seen:
            seen.add(kind)
            model = part_model(config, signature, dtype, slots)
            lines, plan = compile_part(package, model, tensorrt.profiles(signature, capacity, slots), capability)
            found += list(read_log(kind, slots, lines, plan))
    return found


def step_seconds(config: ModelConfig, profiles: list[Profile], gpu: str) -> dict[str, float]:
    """The parts of a reuse step's time on a GPU, in seconds, on paper.

    Weights in two bytes are read once; K and V once by attention and K once by the
    tests; a copy is read and written; each kernel of a layer and its tests costs
    one latency. The head's and the host's share is left out.
    """
    bandwidth, latency = GPUS[gpu]
    reuse = [row for row in profiles if row.profile == 0 and row.part in ("layer", "drift_row", "tests_row", "probe")]
    if any(row.part == "tests_row" for row in reuse):
        reuse = [row for row in reuse if row.part != "probe"]  # which runs in whole passes only
    slots, keys = reuse[0].slots, config.kv_heads * config.head_size * 2
    weights = 2 * (config.layers * config.layer_numbers + config.vocab * config.d_model)
    tests = len(reuse) - 1
    times = {
        "weights": weights / bandwidth,
        "keys and values": config.layers * slots * keys * (2 + tests) / bandwidth,
        "copies": config.layers * sum(2 * row.copied for row in reuse) / bandwidth,
        "kernels": config.layers * sum(row.kernels for row in reuse) * latency,
    }
    return times | {"step": sum(times.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llada-8b", help="default: llada-8b")
    parser.add_argument("--length", type=int, action="append", help="positions (repeatable; default: 1024 and 4096)")
    parser.add_argument("--window", type=int, default=16, help="default: 16")
    parser.add_argument("--capability", default="8.9", help="compute capability (default: 8.9)")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    package = find("tensorrt_rtx")
    rows: list[dict[str, Any]] = []
    steps = []
    for length in args.length or [1024, 4096]:
        config = replace(FAMILY.read_config(COMMON | SHAPES[args.shape]), max_length=length)
        profiles = figures(config, args.window, "fp16", args.capability, package)
        rows += [asdict(profile) for profile in profiles]
        for gpu in GPUS:
            steps.append({"slots": profiles[0].slots, "gpu": gpu} | step_seconds(config, profiles, gpu))
    for row in rows:
        print("{part:10} {slots:5} profile {profile}: {kernels:3} kernels, {products} products, {copies} copies of "
              "{copied:11,} bytes, {streams} streams, scratch {scratch:14,}".format(**row))  # fmt: skip
    for step in steps:
        shown = ", ".join(f"{name} {1e3 * value:.2f}" for name, value in step.items() if isinstance(value, float))
        print(f"{step['gpu']}, {step['slots']} slots, ms on paper: {shown}")
    if args.out:
        found = {"shape": args.shape, "capability": args.capability, "tensorrt_rtx": package.version}
        args.out.write_text(json.dumps(found | {"profiles": rows, "steps": steps}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
