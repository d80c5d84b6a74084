"""Measure what the vision parts of the published shape cost to export and to build: seconds, peak resident memory.

    python scripts/experiments/bench_vision.py --work DIR      about 4 GB of disk

Makes a checkpoint with random weights whose tower (SigLIP so400m, 384 pixels) and projector have the published shape;
its language model has one thin layer and is not measured. Each stage runs in its own process: writing the parts in
fp16, the ONNX Runtime engines from them, opening these and running one tile, and, if tensorrt-rtx is installed,
compiling both parts ahead of time. Prints one JSON line and writes docs/benchmarks/vision_export.json.
"""

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engines import registry as backends
from engines.bundle import STAMPS, Bundle
from engines.record import NEXT
from engines.registry import installed, versions
from engines.signatures.vision import vision_signatures
from engines.trt import package
from engines.vision import open_vision
from export.build import build, plan
from export.checkpoint.families.llava_llada import FAMILY, MASK, SUPPRESSED
from export.compilers import tensorrt
from export.compilers.tensorrt_engine import build_engine
from export.job import BuildJob
from export.options import BuildOptions
from export.part import Target
from runtime.bench.cases import write
from scripts.experiments import report
from scripts.experiments.make_random_checkpoint import DTYPES, Normals

OUT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "vision_export.json"
LENGTH, CAPABILITY = 64, "8.9"
SHAPE: dict[str, Any] = {
    "architectures": list(FAMILY.architectures), "model_type": FAMILY.model_type, "hidden_size": 4096,
    "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 1, "intermediate_size": 128,
    "vocab_size": 64, "max_position_embeddings": 16384, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "eos_token_id": 1, "mm_hidden_size": 1152, "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": "siglip2-so400m-patch14-384", "mm_patch_merge_type": "spatial_unpad",
    "mm_vision_select_layer": -2, "image_aspect_ratio": "anyres_max_4",
    "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)],
}  # fmt: skip


def make_checkpoint(out: Path) -> None:
    """Write the checkpoint, one shard per part."""
    out.mkdir(parents=True)
    added = {str(number): {"content": text} for number, text in enumerate((MASK, *SUPPRESSED))}
    (out / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")
    (out / "config.json").write_text(json.dumps(SHAPE, indent=1), encoding="utf-8")
    config = FAMILY.read_config(FAMILY.complete(out, SHAPE))
    normals = Normals(0, DTYPES["fp16"])
    shards: dict[str, str] = {}
    for part in (*config.parts, *config.vision_parts):
        stored = {
            weight.tensor: normals.draw(weight.shape, 0.02) + (name.split(".")[-2:] == ["norm1", "weight"])
            for name, weight in FAMILY.weights(config, part).items()
        }
        save_file(stored, out / f"{part}.safetensors")
        shards |= dict.fromkeys(stored, f"{part}.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}), encoding="utf-8")


def job(work: Path) -> BuildJob:
    """A planned build of the bundle that has not started."""
    options = BuildOptions(work / "checkpoint", work / "bundle", "fp16", max_length=LENGTH, window=8, max_batch=1)
    made = plan(options)
    made = replace(made, root=made.root / NEXT)
    (made.root / STAMPS).mkdir(parents=True, exist_ok=True)
    return made


def write_parts(work: Path, folder: str, dtype: str) -> None:
    """Write the vision parts' graphs or ONNX Runtime engines of a precision."""
    made = job(work)
    signatures = vision_signatures(made.config, dtype)
    made.write_parts(Target(folder=folder, dtype=dtype, precision="fp16", config=made.config, signatures=signatures))


def finish(work: Path) -> None:
    """Build the missing files of the bundle, so that it can be opened."""
    build(work / "checkpoint", work / "bundle", "fp16", max_length=LENGTH, window=8)


def open_and_run(work: Path) -> dict[str, Any]:
    """Open the vision runner, and run one tile twice; the second run is timed."""
    model = backends.load(Bundle.open(work / "bundle"), "onnxruntime")
    assert model.config.vision is not None
    side = model.config.vision.image_size
    began = time.perf_counter()
    runner = open_vision(model)
    opened = time.perf_counter()
    runner.project(np.zeros((1, 3, side, side), np.float32))
    warm, used = time.perf_counter(), time.process_time()
    runner.project(np.zeros((1, 3, side, side), np.float32))
    return {
        "open_seconds": round(opened - began, 1), "tile_seconds": round(time.perf_counter() - warm, 2),
        "tile_cpu_seconds": round(time.process_time() - used, 2), "device": model.device,
    }  # fmt: skip


def compile_part(work: Path, part: str) -> dict[str, Any]:
    """Compile one part with tensorrt-rtx."""
    made = job(work)
    vision = made.config.vision
    assert vision is not None
    (signature,) = (signature for signature in vision_signatures(made.config, "fp16") if signature.name == part)
    graph = tensorrt.with_weights_as_inputs(made.root / "onnx" / f"{part}.onnx", LENGTH)
    spans = tensorrt.profiles(signature, made.capacity, LENGTH, vision.tiles)
    began = time.perf_counter()
    plan, _ = build_engine(package.find("tensorrt_rtx"), part, graph, spans, [CAPABILITY])
    return {"compile_seconds": round(time.perf_counter() - began, 1), "plan_mb": round(len(plan) / 1e6, 2)}


STAGES: dict[str, Callable[[Path], dict[str, Any] | None]] = {
    "checkpoint": lambda work: make_checkpoint(work / "checkpoint"),
    "export fp16": lambda work: write_parts(work, "onnx", "fp16"),
    "onnxruntime fp32": lambda work: write_parts(work, "engines/onnxruntime", "fp32"),
    "the rest of the bundle": finish,
    "onnxruntime, one tile": open_and_run,
    "tensorrt_rtx tower": lambda work: compile_part(work, "tower"),
    "tensorrt_rtx projector": lambda work: compile_part(work, "projector"),
}
UNMEASURED = ("checkpoint", "the rest of the bundle")


def stage(work: Path, name: str) -> dict[str, Any]:
    """Run a stage in its own process; returns its figures."""
    command = [sys.executable, __file__, "--work", str(work), "--stage", name]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="a new folder; removed at the end")
    parser.add_argument("--out", type=Path, default=OUT, help="write the figures to this file too")
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        began = time.perf_counter()
        more = STAGES[args.stage](args.work) or {}
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds, cpu = time.perf_counter() - began, used.ru_utime + used.ru_stime
        cost = {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}
        print(json.dumps(cost | {"peak_rss_gib": round(used.ru_maxrss / 2**20, 2)} | more))
        return
    if args.work.exists():
        parser.error(f"{args.work} exists; name a new folder")
    args.work.mkdir(parents=True)
    try:
        names = [name for name in STAGES if not name.startswith("tensorrt_rtx") or installed("tensorrt_rtx")]
        stages = {name: stage(args.work, name) for name in names}
        sizes = {p.stem: p.stat().st_size for p in (args.work / "bundle/onnx").glob("*.safetensors")}
    finally:
        shutil.rmtree(args.work)
    figures = {
        "command": report.command(__file__),
        "shape": "SigLIP so400m (26 layers, 384 pixels), projector to 4096",
        "tower_fp16_gb": round(sizes["tower"] / 1e9, 3), "projector_fp16_gb": round(sizes["projector"] / 1e9, 3),
        "stages": {name: figures for name, figures in stages.items() if name not in UNMEASURED},
        "capability": CAPABILITY, "tiles": 37, "weights": "random",
        "machine": f"{platform.machine()}, no GPU, Python {platform.python_version()}", "versions": versions(),
    }  # fmt: skip
    write(figures, args.out)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
