"""The command line of `export`: build, verify and inspect bundles."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from engines.bundle import Bundle
from engines.cli import Parser, program, run, screen
from engines.config import PRECISIONS
from engines.registry import BACKENDS
from engines.trt.package import FLAVOURS
from export.build import build, estimate, plan
from export.compilers import COMPILERS, WEIGHTS
from export.verify import TOLERANCES, verify

NATIVE = ("ROTARY_EMBEDDING", "KV_CACHE_UPDATE", "ATTENTION_INPUT", "MATRIX_MULTIPLY", "GATHER", "TOPK", "SOFTMAX")
console = screen()
GIGA = 1e9


def parser() -> argparse.ArgumentParser:
    top = Parser(prog=program("export"), description="From a LLaDA checkpoint to a bundle of engines.")
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser)
    make = commands.add_parser("build", help="build the bundle of a checkpoint")
    make.add_argument("--checkpoint", default="demo", help="Hugging Face directory, or 'demo' (default)")
    make.add_argument("--out", type=Path, help="the bundle's folder (default: bundles/<checkpoint's name>)")
    precision = make.add_mutually_exclusive_group()
    for name in PRECISIONS:
        precision.add_argument(f"--{name}", dest="precision", action="store_const", const=name)
    make.add_argument("--backend", action="append", choices=[*COMPILERS, "all", "none"],
                      help="compile for this back end (repeatable; none: export only)")  # fmt: skip
    make.add_argument("--max-length", type=int, help="positions of prompt and answer (default: the checkpoint's)")
    make.add_argument("--window", type=int, help="largest window at run time (default: the checkpoint's own, or 16)")
    make.add_argument("--track-num", type=int, default=1, help="largest track_num at run time (default 1)")
    make.add_argument("--max-batch", type=int, default=16, help="most sequences decoded side by side (default 16)")
    make.add_argument("--flavour", choices=list(FLAVOURS), help="of TensorRT (default: the first installed)")
    make.add_argument("--capability", action="append", dest="capabilities", metavar="N.N",
                      help="compute capability to build TensorRT engines for (repeatable)")  # fmt: skip
    make.add_argument("--weights", choices=list(WEIGHTS), help="quantise ONNX Runtime's matrices (default: do not)")
    make.add_argument("--dry-run", action="store_true", help="print parts, disk and memory; write nothing")
    make.add_argument("--force", action="store_true", help="replace the bundle in --out, or build among other files")
    make.set_defaults(call=build_command, precision="fp32")
    check = commands.add_parser("verify", help="compare parts and the plain forward with eager PyTorch")
    check.add_argument("bundle", type=Path)
    check.add_argument("--backend", choices=list(BACKENDS), default="onnxruntime")
    check.add_argument(
        "--atol",
        type=float,
        help=f"tolerance, times a part's largest number where that is more than 1 (default: {TOLERANCES} by precision)",
    )
    check.set_defaults(call=verify_command)
    look = commands.add_parser("inspect", help="show what a bundle holds")
    look.add_argument("bundle", type=Path)
    look.add_argument("--json", action="store_true", help="print the manifest")
    look.set_defaults(call=inspect_command)
    return top


def build_command(args: argparse.Namespace) -> None:
    backends = [] if args.backend == ["none"] else args.backend
    options = dict(
        precision=args.precision, backends=backends, max_length=args.max_length, window=args.window,
        track_num=args.track_num, max_batch=args.max_batch, flavour=args.flavour, capabilities=args.capabilities,
        weights=args.weights,
    )  # fmt: skip
    job = plan(args.checkpoint, args.out, **options)
    need = estimate(job)
    c = job.config
    console.print(
        f"{job.checkpoint.directory.name}: {c.family}, {c.layers} layers of width {c.d_model}, {c.heads} heads "
        f"({c.kv_heads} key/value), vocabulary {c.vocab}, length {c.max_length}, {args.precision}"
    )
    console.print(f"needs about {need['disk'] / GIGA:.3f} GB of disk and {need['memory'] / GIGA:.3f} GB of memory")
    if args.dry_run:
        for part in (*c.parts, *c.vision_parts):
            console.print(f"  {part}")
        console.print(f"would write {job.root}; back ends: {', '.join(job.backends) or 'none'}")
        return
    began = time.perf_counter()
    tasks: dict[str, Any] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:

        def progress(what: str, number: int, count: int) -> None:
            folder, _, part = what.rpartition("/")
            if folder not in tasks:
                tasks[folder] = bar.add_task(folder, total=count)
            bar.update(tasks[folder], completed=number, total=count, description=f"{folder} {part}")
            if not console.is_terminal:
                console.print(f"[{number}/{count}] {what}")

        root = build(args.checkpoint, args.out, force=args.force, progress=progress, **options)
    files = Bundle.open(root).manifest.files
    size = sum(f["size"] for f in files.values()) / GIGA
    how = f"{time.perf_counter() - began:.1f} s" if tasks else "up to date"
    console.print(f"[ok] {root}: {len(files)} files, {size:.3f} GB, {how}")


def verify_command(args: argparse.Namespace) -> None:
    bundle = Bundle.open(args.bundle)
    weights = bundle.manifest.engines.get(args.backend, {}).get("weights")
    atol = args.atol if args.atol is not None else TOLERANCES[weights or bundle.manifest.precision]
    title = f"{args.backend} against eager, tolerance {atol:g} of the largest number, or of 1"
    table = Table("part", "max", "mean", "cosine", "largest number", title=title)
    for row in verify(bundle, args.backend, atol):
        table.add_row(row.part, f"{row.max:.2e}", f"{row.mean:.2e}", f"{row.cosine:.8f}", f"{row.scale:.4g}")
    console.print(table)
    console.print("[ok] all values close")


def inspect_command(args: argparse.Namespace) -> None:
    bundle = Bundle.open(args.bundle)
    manifest = bundle.manifest
    if args.json:
        print(json.dumps(vars(manifest), indent=1))
        return
    console.print(f"{args.bundle}: {manifest.checkpoint['name']} ({manifest.checkpoint['identity'][:16]}), "
                  f"{manifest.precision}, built with {manifest.tools}")  # fmt: skip
    console.print(f"model {manifest.model}")
    console.print(f"capacity {manifest.capacity}")
    for name, entry in manifest.engines.items():
        show_engines(name, entry, manifest.files)
    table = Table("part", "inputs", "outputs", "MB")
    for name, part in manifest.parts.items():
        size = sum(manifest.files[part[k]]["size"] for k in ("graph", "weights") if part[k]) / 1e6
        shown = ("\n".join(f"{p['name']} {p['dtype']} {p['axes']}" for p in part[k]) for k in ("inputs", "outputs"))
        table.add_row(name, *shown, f"{size:.2f}")
    console.print(table)


def show_engines(name: str, entry: dict[str, Any], files: dict[str, Any]) -> None:
    """What was built for a back end: compiler and targets, then each plan's profiles, native layers and size."""
    if "plans" not in next(iter(entry["parts"].values())):
        weights = f", weights in {entry['weights']}" if entry.get("weights") else ""
        console.print(f"engines {name}: {entry['precision']}{weights}, profiles {entry['profiles']}")
        return
    targets = ", ".join(entry["capabilities"])
    console.print(f"engines {name}: {entry['precision']}, {entry['flavour']} {entry['version']}, "
                  f"compute capability {targets}, slots {entry['slots']}")  # fmt: skip
    table = Table("part", "plans", "layers that stayed native", "profiles")
    for part, made in entry["parts"].items():
        plans = "\n".join(f"{Path(file).name} {files[file]['size'] / 1e6:.2f} MB" for file in made["plans"].values())
        native = "\n".join(f"{count} {kind}" for kind, count in made["layers"].items() if kind in NATIVE)
        table.add_row(part, plans, native, "\n".join(map(str, entry["profiles"][part])))
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run(args.call, args, "interrupted; run the same command again to go on where it stopped")
