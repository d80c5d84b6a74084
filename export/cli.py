"""The command line of `export`: build, verify and inspect bundles."""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from engines.bundle import Bundle
from engines.cli import Parser, program, progress, run, screen
from engines.registry import BACKENDS
from export import options
from export.build import plan
from export.build import run as build_planned
from export.estimate import estimate
from export.inspect import show
from export.pack import pack
from export.verify import GRAPHS, TOLERANCES, tolerance, verify

console = screen()
GIGA = 1e9
RESUMES = "interrupted; run the same command again to go on where it stopped"


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `call` to its function."""
    top = Parser(prog=program("export"), description="Build, verify and inspect bundles of diffusion language models.")
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(name: str, help: str, call: Callable[[argparse.Namespace], None], example: str) -> Parser:
        made: Parser = commands.add_parser(
            name, help=help, description=f"{help[0].upper()}{help[1:]}.", example=example
        )
        made.set_defaults(call=call)
        return made

    make = command("build", "build the bundle of a checkpoint", build_command,
                   "--checkpoint path/to/LLaDA-8B-Instruct --fp16 --out bundles/llada")  # fmt: skip
    options.add_arguments(make)
    make.add_argument("--dry-run", action="store_true", help="print parts, disk and memory; write nothing")
    make.add_argument("--json", action="store_true", help="print JSON in place of text; progress is on standard error")
    check = command("verify", "compare parts and the plain forward with eager PyTorch", verify_command,
                    f"bundles/demo --backend {GRAPHS}")  # fmt: skip
    check.add_argument("bundle", type=Path, help="a bundle's folder")
    check.add_argument("--backend", choices=[*BACKENDS, GRAPHS], default="onnxruntime",
                       help=f"back end to compare, or {GRAPHS}: the exported graphs, run on the CPU")  # fmt: skip
    check.add_argument(
        "--atol", type=float, metavar="X",
        help=f"tolerance, times a part's largest number where that is more than 1 (default: {TOLERANCES} by precision)",
    )  # fmt: skip
    check.add_argument("--half", action="store_true",
                       help="instead, run each part of an fp16 bundle with every operation rounded to fp16, as a GPU "
                       "does, and show how near its numbers come to the end of the range")  # fmt: skip
    check.add_argument("--json", action="store_true", help="print JSON, a line for each part, in place of the table")
    deploy = command("pack", "copy the part of a bundle that a deployment needs", pack_command,
                     "bundles/demo --backend onnxruntime --out deploy")  # fmt: skip
    deploy.add_argument("bundle", type=Path, help="a bundle's folder")
    deploy.add_argument(
        "--backend", dest="backends", action="append", choices=list(BACKENDS), required=True,
        help="back end that the pack is for (repeatable)",
    )  # fmt: skip
    deploy.add_argument("--out", type=Path, required=True, help="folder of the pack, new or empty")
    deploy.add_argument("--json", action="store_true", help="print JSON in place of text")
    look = command("inspect", "show what a bundle holds", inspect_command, "bundles/demo")
    look.add_argument("bundle", type=Path, help="a bundle's folder")
    look.add_argument("--json", action="store_true", help="print the manifest as JSON")
    return top


def build_command(args: argparse.Namespace) -> None:
    """Build a bundle, or with --dry-run print what would be built."""
    console = Console(stderr=True) if args.json else screen()
    bars = FolderBars(console)
    job = plan(options.from_arguments(args, bars.show))
    need = estimate(job)
    c = job.config
    if args.json and args.dry_run:
        planned = {"bundle": str(job.root), "parts": [*c.parts, *c.vision_parts], "backends": list(job.backends)}
        print(json.dumps(planned | {f"{name}_bytes": round(size) for name, size in need.items()}))
        return
    console.print(
        f"{job.checkpoint.directory.name}: {c.family}, {c.layers} layers of width {c.d_model}, {c.heads} heads "
        f"({c.kv_heads} key/value), vocabulary {c.vocab}, length {c.max_length}, {job.options.precision}"
    )
    console.print(f"needs about {need['disk'] / GIGA:.3f} GB of disk and {need['memory'] / GIGA:.3f} GB of memory")
    if args.dry_run:
        for part in (*c.parts, *c.vision_parts):
            console.print(f"  {part}")
        console.print(f"would write {job.root}; back ends: {', '.join(job.backends) or 'none'}")
        return
    began = time.perf_counter()
    with bars:
        root = build_planned(job)
    files = Bundle.open(root).manifest.files
    size = sum(entry["size"] for entry in files.values())
    seconds = time.perf_counter() - began
    if args.json:
        done = {"bundle": str(root), "files": len(files), "bytes": size, "seconds": seconds}
        print(json.dumps(done | {"up_to_date": not bars.bars}))
        return
    how = f"{seconds:.1f} s" if bars.bars else "up to date"
    console.print(f"[ok] {root}: {len(files)} files, {size / GIGA:.3f} GB, {how}")


class FolderBars(Progress):
    """A progress bar for each folder that is written; a line for each part where the output is no terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )
        self.bars: dict[str, TaskID] = {}

    def show(self, what: str, number: int, count: int) -> None:
        """Show that part `number` of `count`, `what` = folder/part, is being written."""
        folder, _, part = what.rpartition("/")
        if folder not in self.bars:
            self.bars[folder] = self.add_task(folder, total=count)
        self.update(self.bars[folder], completed=number, total=count, description=f"{folder} {part}")
        if not self.console.is_terminal:
            self.console.print(f"[{number}/{count}] {what}")


def verify_command(args: argparse.Namespace) -> None:
    """Compare a bundle with the reference and print a row for each part."""
    bundle = Bundle.open(args.bundle)
    if args.half:
        return verify_half_command(bundle, args.json)
    atol = args.atol if args.atol is not None else tolerance(bundle, args.backend)
    title = f"{args.backend} against eager, tolerance {atol:g} of the largest number, or of 1"
    table = Table("part", "max", "mean", "cosine", "largest number", title=title)
    with progress("verify", rows_of(bundle, args.backend)) as done:
        for number, row in enumerate(verify(bundle, args.backend, atol), 1):
            done(number)
            if args.json:
                print(json.dumps(vars(row)))
            table.add_row(row.part, f"{row.max:.2e}", f"{row.mean:.2e}", f"{row.cosine:.8f}", f"{row.scale:.4g}")
    if not args.json:
        console.print(table)
        console.print("[ok] all values close")


def rows_of(bundle: Bundle, backend: str) -> int:
    """How many differences `verify` yields: one for each output of a graph; or for each part, forward and newline."""
    parts = bundle.manifest.parts
    if backend == GRAPHS:
        return sum(len(part["outputs"]) for part in parts.values())
    return len(parts) + 1 + bool(bundle.config.vision)


def verify_half_command(bundle: Bundle, as_json: bool) -> None:
    """Print the largest number of each part in fp16."""
    from export.half import LARGEST, verify_half

    table = Table("part", "largest number", "of the range", title="every operation in fp16, on probe texts")
    for part, largest in verify_half(bundle):
        if as_json:
            print(json.dumps({"part": part, "largest": float(largest), "of_range": float(largest / LARGEST)}))
        table.add_row(part, f"{largest:.4g}", f"{largest / LARGEST:.1%}")
    if not as_json:
        console.print(table)
        console.print("[ok] no activation leaves the range of fp16")


def pack_command(args: argparse.Namespace) -> None:
    """Copy what back ends need of a bundle."""
    root = pack(Bundle.open(args.bundle), args.backends, args.out)
    files = Bundle.open(root).manifest.files
    size = sum(entry["size"] for entry in files.values())
    if args.json:
        print(json.dumps({"bundle": str(root), "files": len(files), "bytes": size}))
    else:
        console.print(f"[ok] {root}: {len(files)} files, {size / GIGA:.3f} GB")


def inspect_command(args: argparse.Namespace) -> None:
    """Print what a bundle holds."""
    bundle = Bundle.open(args.bundle)
    if args.json:
        print(json.dumps(vars(bundle.manifest), indent=1))
    else:
        show(bundle, console)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's); returns the exit code."""
    args = parser().parse_args(argv)
    resumes = args.command == "build" and not args.dry_run
    return run(args.call, args, RESUMES if resumes else "interrupted")
