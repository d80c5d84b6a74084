"""The long checks before a release: ONNX Runtime and eager PyTorch against the oracle on many models and prompts.

    python scripts/check.py
    python scripts/check.py --models 5 --prompts 5 --json check.json

Random tiny models with many options, and held-out problems of the demo checkpoint with its defaults, are decoded by
Elastic-Cache on both back ends and by the oracle, and compared decision by decision. A run with a decision whose margin
is below 1e-4 is ambiguous: float noise may change it. The check fails if any other run diverged, or if too many runs
were ambiguous.
"""

import argparse
import math
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engines.cli import run
from engines.errors import OptionError, ParityError
from engines.registry import versions
from export.build import DEMO
from export.checkpoint.reader import open_checkpoint
from runtime.bench.cases import write
from tests.support.comparison import AMBIGUOUS, BACKENDS, NOISE, RUNS, Comparison, Tally, demo_prompts, random_models

OUT = Path(__file__).resolve().parents[1] / "docs" / "checks" / "parity.json"
console = Console(soft_wrap=True)


def check(args: argparse.Namespace) -> None:
    """Compare all runs, print and write the figures; raises ParityError if the check fails."""
    if min(args.models, args.prompts) < 1:
        raise OptionError(f"--models and --prompts must be at least 1, got {args.models} and {args.prompts}")
    checkpoint = DEMO if args.checkpoint == "demo" else Path(args.checkpoint)
    identity = open_checkpoint(checkpoint).identity
    began = time.perf_counter()
    sets = {
        "random models": tallied("random models", random_models(args.models), args.models * RUNS),
        "demo prompts": tallied("demo prompts", demo_prompts(args.prompts, args.checkpoint), args.prompts),
    }
    show(sets)
    report = {
        "versions": versions(), "platform": f"{platform.system()} {platform.machine()}", "backends": BACKENDS,
        "noise": NOISE, "largest_fraction_ambiguous": AMBIGUOUS, "checkpoint": identity, "models": args.models,
        "seconds": round(time.perf_counter() - began, 1), "holds": all(tally.holds for tally in sets.values()),
        "sets": {name: describe(tally) for name, tally in sets.items()},
    }  # fmt: skip
    write(report, args.json)
    failing = [name for name, tally in sets.items() if not tally.holds]
    if failing:
        raise ParityError(f"{' and '.join(failing)}: runs diverged, or too many were ambiguous; see {args.json}")
    console.print(f"[ok] no run diverged; the figures are in {args.json}", markup=False)


def tallied(name: str, runs: Iterator[Comparison], count: int) -> Tally:
    """Collect `runs`, with a progress bar at a terminal."""
    return Tally(list(track(runs, name, count, console=console, disable=not console.is_terminal)))


def show(sets: dict[str, Tally]) -> None:
    """Print the summary table, then each ambiguous or diverged run."""
    table = Table("", "compared", "equal", "ambiguous", "diverged", "refreshes", "smallest margin")
    for name, tally in sets.items():
        c = tally.counts()
        counts = (str(c[column]) for column in ("compared", "equal", "ambiguous", "diverged", "refreshes"))
        table.add_row(name, *counts, f"{min(tally.margins().values()):.1e}")
    console.print(table)
    for tally in sets.values():
        for comparison in tally.ambiguous:
            close = {kind: f"{margin:.1e}" for kind, margin in comparison.margins.items() if margin < NOISE}
            ending = f"diverged {comparison.diverged}" if comparison.diverged else "equal nevertheless"
            console.print(f"ambiguous: {comparison.name}: {close}, {ending}", markup=False)
        for comparison in tally.diverged:
            console.print(f"diverged: {comparison.name}: {comparison.diverged}", markup=False)


def describe(tally: Tally) -> dict[str, Any]:
    """The figures of a set as JSON values."""

    def listed(comparison: Comparison) -> dict[str, Any]:
        return {"name": comparison.name, "margins": finite(comparison.margins), "diverged": comparison.diverged}

    return {
        **tally.counts(), "smallest_margins": finite(tally.margins()),
        "largest_sigma_difference": max(run.sigma for run in tally.runs),
        "runs_ambiguous": list(map(listed, tally.ambiguous)), "runs_diverged": list(map(listed, tally.diverged)),
    }  # fmt: skip


def finite(margins: dict[str, float]) -> dict[str, float]:
    """The margins without those of kinds of decision that a run did not take."""
    return {kind: margin for kind, margin in margins.items() if math.isfinite(margin)}


def main() -> int:
    """Parse the options and run the check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", type=int, default=50, help=f"random models, {RUNS} runs each (default 50)")
    parser.add_argument("--prompts", type=int, default=50, help="problems for the demo checkpoint (default 50)")
    parser.add_argument("--checkpoint", default="demo", help="a checkpoint with the demo's tokenizer")
    parser.add_argument("--json", type=Path, default=OUT, help="file of the figures (default: %(default)s)")
    return run(check, parser.parse_args(), "interrupted; no figures were written")


if __name__ == "__main__":
    sys.exit(main())
