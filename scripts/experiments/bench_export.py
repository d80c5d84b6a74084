"""Measure what exporting a checkpoint costs: seconds, peak resident memory, bytes read and written.

    python scripts/experiments/bench_export.py --shape llada-8b --work DIR      about 32 GB of disk
    python scripts/experiments/bench_export.py --shape llada-8b --work DIR --root OTHER_TREE --backend onnxruntime

Makes a random checkpoint of the shape (unless it is there), runs `python -m
export build --fp16` of the tree `--root` in a process of its own, and prints one
JSON line.

Bytes read are counted in that process, in two figures. `read_gb` are the bytes
that read calls returned (rchar of /proc/self/io), from the page cache or the
disk. Tensors of the checkpoint are memory-mapped and do not appear there:
`mapped_gb` are the bytes of the tensors that safetensors' `get_tensor` returned,
each of which is read at least once. `disk_gb` is what the kernel fetched from
the disk for both (ru_inblock); it is 0 for files in the page cache.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

TREE = Path(__file__).resolve().parents[2]
# Runs `python -m export` with its arguments and writes what it cost to the file sys.argv[1].
COUNTED = r'''
import json, resource, runpy, sys, time
import safetensors

class Counted:
    """An opened safetensors file that counts the bytes of the tensors it returns."""
    mapped = 0

    def __init__(self, *args, **options):
        self.file = opened(*args, **options)

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def get_tensor(self, name):
        tensor = self.file.get_tensor(name)
        Counted.mapped += tensor.nbytes
        return tensor

def totals():
    return {key: int(value) for key, value in (line.split(": ") for line in open("/proc/self/io", encoding="utf-8"))}

opened, safetensors.safe_open = safetensors.safe_open, Counted
file = sys.argv.pop(1)
before, began = totals(), time.perf_counter()
try:
    runpy.run_module("export", run_name="__main__", alter_sys=True)
finally:
    seconds, after, usage = time.perf_counter() - began, totals(), resource.getrusage(resource.RUSAGE_SELF)
    found = {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_gib": round(usage.ru_maxrss / 2**20, 2),
        "read_gb": round((after["rchar"] - before["rchar"]) / 1e9, 2),
        "mapped_gb": round(Counted.mapped / 1e9, 2),
        "disk_gb": round(usage.ru_inblock * 512 / 1e9, 2),
        "written_gb": round((after["wchar"] - before["wchar"]) / 1e9, 2),
    }
    with open(file, "w", encoding="utf-8") as out:
        json.dump(found, out)
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="llada-8b")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint and the bundle")
    parser.add_argument("--root", type=Path, default=TREE, help="source tree whose export is run (default: this one)")
    parser.add_argument("--backend", default="none", help="also compile for this back end")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--out", type=Path, help="write the figures to this file too")
    parser.add_argument("--keep", action="store_true", help="keep the bundle")
    args = parser.parse_args()
    checkpoint, bundle = args.work / f"{args.shape}-{args.layers or 'all'}", args.work / "bundle"
    if not (checkpoint / "config.json").exists():
        make = [sys.executable, str(TREE / "scripts/experiments/make_random_checkpoint.py"), "--shape", args.shape]
        layers = ["--layers", str(args.layers)] if args.layers else []
        subprocess.run([*make, "--out", str(checkpoint), "--dtype", "fp16", *layers], check=True)
    figures = {
        "command": f"scripts/experiments/bench_export.py --shape {args.shape} --backend {args.backend}",
        "layers": args.layers or "all",
        **export(args.root, checkpoint, bundle, args.backend),
        "checkpoint_gb": round(size(checkpoint) / 1e9, 2),
        "bundle_gb": round(size(bundle) / 1e9, 2),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("torch", "onnx", "safetensors")},
    }
    if not args.keep:
        shutil.rmtree(bundle)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures))


def export(root: Path, checkpoint: Path, bundle: Path, backend: str) -> dict[str, Any]:
    """Build the bundle with the tree `root`; returns seconds, peak memory and bytes."""
    file = checkpoint.parent / "cost.json"
    build = ["build", "--fp16", "--backend", backend, "--checkpoint", str(checkpoint), "--out", str(bundle)]
    command = [sys.executable, "-c", COUNTED, str(file), *build]
    subprocess.run(command, check=True, cwd=root, stdout=sys.stderr)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return found


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    main()
