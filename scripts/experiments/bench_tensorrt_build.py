"""Measure three ways to compile the layers of a model for TensorRT, ahead of time and without a GPU.

    python scripts/experiments/bench_tensorrt_build.py --shape llada-8b --work DIR      about 1 GB of disk

`constants`: the weights lie in the plan, so each layer is built. `refit`: one
plan whose weights are marked refittable one by one; each layer is refitted when
it is loaded. `inputs`: the weights are inputs of the engine, one plan serves all
layers (what `python -m export build` does). Each runs in a process of its own
on one layer with random weights; prints one JSON line. Needs tensorrt-rtx.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import onnx
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engines.config import Capacity
from engines.signatures import GraphSignature
from engines.signatures.gpu import layer_signature
from engines.trt.package import find
from export.checkpoint.families.llada import FAMILY as LLADA
from export.compilers import tensorrt
from export.compilers.tensorrt_engine import build_engine, configuration, polygraphy_for, reported
from export.part import Target, write_graph, write_weights
from scripts.experiments.make_random_checkpoint import COMMON, SHAPES

WAYS = ("constants", "refit", "inputs")


def write_layer(shape: str, length: int, window: int, work: Path) -> tuple[Path, Capacity, int]:
    """Export one layer with random weights; returns its graph, the capacity and the number of layers."""
    config = LLADA.read_config(COMMON | SHAPES[shape] | {"torch_dtype": "float16"})
    layers = config.layers
    config = replace(config, max_length=min(length, config.max_length))
    capacity = Capacity.of(config, config.max_length, window, 1, 1)
    generator = torch.Generator().manual_seed(0)
    d, kv = config.d_model, config.kv_heads * config.head_size
    shapes = {
        "q_proj": (d, d), "k_proj": (d, kv), "v_proj": (d, kv), "attn_out": (d, d),
        "ff_proj": (d, config.mlp_size), "up_proj": (d, config.mlp_size), "ff_out": (config.mlp_size, d),
        "attn_norm": (d,), "ff_norm": (d,),
    }  # fmt: skip

    def load() -> dict[str, torch.Tensor]:
        return {
            f"{name}.weight": torch.randn(dims, generator=generator).mul_(0.02).half() if len(dims) == 2
            else torch.ones(dims, dtype=torch.float16) for name, dims in shapes.items()
        }  # fmt: skip

    target = Target("onnx", "fp16", "fp16", config, (layer_signature(config, "fp16", 0),))
    (work / "stamps").mkdir(parents=True, exist_ok=True)
    write_weights(work, "layer_00", [target], load(), f"random {shape}")
    write_graph(work, target, "layer_00")
    return work / "onnx" / "layer_00.onnx", capacity, layers


def build(way: str, path: Path, capacity: Capacity, capabilities: list[str]) -> tuple[float, int]:
    """Compile the layer one way; returns seconds and the plan's bytes."""
    package = find("tensorrt_rtx")
    slots = capacity.max_length + capacity.rows
    profiles = tensorrt.profiles(GraphSignature(path.stem, (), ()), capacity, slots)
    began = time.perf_counter()
    if way == "inputs":
        model = tensorrt.with_weights_as_inputs(path, slots)
        plan, _ = build_engine(package, path.stem, model, profiles, capabilities)
        return time.perf_counter() - began, len(plan)
    fixed = onnx.load(str(path), load_external_data=False)  # refers to the weights, so they become constants
    tensorrt.fix_slots(fixed, slots)
    onnx.save(fixed, str(path.with_name("fixed.onnx")))
    external = [t for t in fixed.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    matrices = [t.name for t in external if len(t.dims) == 2]
    polygraphy = polygraphy_for(package)
    with reported(polygraphy, f"{way}: cannot build {path.stem}", "try another way"):
        parsed = polygraphy.loaders.network_from_onnx_path(str(path.with_name("fixed.onnx")))
        config = configuration(polygraphy, package, fixed, profiles, capabilities)
        if way == "refit":
            network = parsed[1]
            for name in matrices:
                network.mark_weights_refittable(name)
            flag = package.module.BuilderFlag.REFIT_INDIVIDUAL
            config = polygraphy.loaders.PostprocessConfig(
                config, lambda builder, network, config: config.set_flag(flag)
            )
        plan = bytes(polygraphy.loaders.engine_bytes_from_network(parsed, config=config))
    return time.perf_counter() - began, len(plan)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="llada-8b")
    parser.add_argument("--work", type=Path, required=True, help="folder for the layer")
    parser.add_argument("--max-length", type=int, default=1400)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--capability", action="append", help="compute capability (repeatable; default 8.9)")
    parser.add_argument("--out", type=Path, help="write the figures to this file too")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    path, capacity, layers = write_layer(args.shape, args.max_length, args.window, args.work)
    capabilities = args.capability or ["8.9"]
    if args.way:
        seconds, size = build(args.way, path, capacity, capabilities)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            json.dumps({"seconds": round(seconds, 2), "plan_mb": round(size / 1e6, 2), "peak_rss_gib": round(peak, 2)})
        )
        return
    weights = path.with_suffix(".safetensors").stat().st_size
    ways = {}
    for way in WAYS:
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--way", way], capture_output=True, text=True)
        if done.returncode == 0:
            ways[way] = json.loads(done.stdout.splitlines()[-1])
        else:
            ways[way] = {"failed": done.stderr.splitlines()[-1]}
    figures = {
        "command": f"scripts/experiments/bench_tensorrt_build.py --shape {args.shape} --max-length {args.max_length}",
        "capabilities": capabilities, "layers": layers, "layer_mb": round(weights / 1e6, 2), "one_layer": ways,
        "limit_rss_gib": round(3 * weights / 2**30 + 2, 2), "tensorrt_rtx": find("tensorrt_rtx").version,
        "machine": f"{platform.machine()}, no GPU, Python {platform.python_version()}",
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
