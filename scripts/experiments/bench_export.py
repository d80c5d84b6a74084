"""Measure what exporting a checkpoint costs: seconds, peak resident memory, bytes written.

    python scripts/experiments/bench_export.py --shape llada-8b --work DIR      about 32 GB of disk

Makes a random checkpoint of the shape (unless it is there), runs `python -m
export build --fp16 --backend none` in a process of its own, and prints one JSON line.
"""

import argparse
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="llada-8b")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint and the bundle")
    parser.add_argument("--backend", default="none", help="also compile for this back end")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--keep", action="store_true", help="keep the bundle")
    args = parser.parse_args()
    root = Path(__file__).resolve().parents[2]
    checkpoint, bundle = args.work / f"{args.shape}-{args.layers or 'all'}", args.work / "bundle"
    if not (checkpoint / "config.json").exists():
        make = [sys.executable, str(root / "scripts/experiments/make_random_checkpoint.py"), "--shape", args.shape]
        layers = ["--layers", str(args.layers)] if args.layers else []
        subprocess.run([*make, "--out", str(checkpoint), "--dtype", "fp16", *layers], check=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    command = [sys.executable, "-m", "export", "build", "--fp16", "--backend", args.backend]
    began = time.perf_counter()
    subprocess.run([*command, "--checkpoint", str(checkpoint), "--out", str(bundle)], check=True, cwd=root)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert peak > before, "the build's peak is hidden by the checkpoint maker's; run again with the checkpoint in place"
    figures = {
        "command": f"scripts/experiments/bench_export.py --shape {args.shape} --backend {args.backend}",
        "layers": args.layers or "all",
        "seconds": round(seconds, 1),
        "peak_rss_gib": round(peak / 2**20, 2),
        "checkpoint_gb": round(size(checkpoint) / 1e9, 2),
        "bundle_gb": round(size(bundle) / 1e9, 2),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("torch", "onnx", "safetensors")},
    }
    if not args.keep:
        shutil.rmtree(bundle)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
