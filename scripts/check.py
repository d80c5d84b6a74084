"""The long checks of a maintainer: every back end and the oracle side by side, on many models and prompts.

    python scripts/check.py
    python scripts/check.py --models 5 --prompts 5 --json check.json

Random tiny models with many options, and held-out problems of the demo checkpoint with its defaults, are decoded by
Elastic-Cache on every back end and by the oracle, and compared decision by decision. A run in which a decision hangs on
less than 1e-4 is set apart, for float noise may settle it. Fails if any other run parted, or too many were set apart.
"""

import argparse
import json
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
from tests.support.comparison import BACKENDS, NOISE, RUNS, SHARE, Comparison, Tally, demo_prompts, random_models

OUT = Path(__file__).resolve().parents[1] / "docs" / "checks" / "parity.json"
console = Console(soft_wrap=True)


def check(args: argparse.Namespace) -> None:
    """Compare, show and write the figures; raises ParityError if they do not hold."""
    if min(args.models, args.prompts) < 1:
        raise OptionError(f"--models and --prompts must be at least 1, got {args.models} and {args.prompts}")
    checkpoint = DEMO if args.checkpoint == "demo" else Path(args.checkpoint)
    identity = open_checkpoint(checkpoint).identity
    began = time.perf_counter()
    sets = {
        "random models": watched("random models", random_models(args.models), args.models * RUNS),
        "demo prompts": watched("demo prompts", demo_prompts(args.prompts, args.checkpoint), args.prompts),
    }
    show(sets)
    report = {
        "versions": versions(), "platform": f"{platform.system()} {platform.machine()}", "backends": BACKENDS,
        "noise": NOISE, "largest_fraction_ambiguous": SHARE, "checkpoint": identity, "models": args.models,
        "seconds": round(time.perf_counter() - began, 1), "holds": all(tally.holds for tally in sets.values()),
        "sets": {name: describe(tally) for name, tally in sets.items()},
    }  # fmt: skip
    try:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise OptionError(
            f"cannot write the figures to {args.json} ({error.strerror}); choose another --json"
        ) from error
    failing = [name for name, tally in sets.items() if not tally.holds]
    if failing:
        raise ParityError(f"{' and '.join(failing)}: runs parted, or too many were set apart; they are in {args.json}")
    console.print(f"[ok] no run parted; the figures are in {args.json}", markup=False)


def watched(name: str, runs: Iterator[Comparison], count: int) -> Tally:
    """All of `runs`, under a progress bar where somebody looks."""
    return Tally(list(track(runs, name, count, console=console, disable=not console.is_terminal)))


def show(sets: dict[str, Tally]) -> None:
    """The summary table, then each run that was set apart or parted."""
    table = Table("", "compared", "equal", "set apart", "diverged", "refreshes", "closest")
    for name, tally in sets.items():
        c = tally.counts()
        few_shot_prompt = c["compared"], c["equal"], c["ambiguous"], c["diverged"], c["refreshes"]
        table.add_row(name, *map(str, few_shot_prompt), f"{min(tally.margins().values()):.1e}")
    console.print(table)
    for tally in sets.values():
        for comparison in tally.ambiguous:
            close = {kind: f"{margin:.1e}" for kind, margin in comparison.margins.items() if margin < NOISE}
            ending = f"parted {comparison.diverged}" if comparison.diverged else "equal all the same"
            console.print(f"set apart: {comparison.name}: {close}, {ending}", markup=False)
        for comparison in tally.diverged:
            console.print(f"parted: {comparison.name}: {comparison.diverged}", markup=False)


def describe(tally: Tally) -> dict[str, Any]:
    """The figures of a set, for JSON."""

    def listed(comparison: Comparison) -> dict[str, Any]:
        return {"name": comparison.name, "margins": finite(comparison.margins), "diverged": comparison.diverged}

    return {
        **tally.counts(), "smallest_margins": finite(tally.margins()),
        "largest_sigma_difference": max(run.sigma for run in tally.runs),
        "runs_apart": list(map(listed, tally.ambiguous)), "runs_parted": list(map(listed, tally.diverged)),
    }  # fmt: skip


def finite(margins: dict[str, float]) -> dict[str, float]:
    """Without the kinds of which a run had no decision to take."""
    return {kind: margin for kind, margin in margins.items() if math.isfinite(margin)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", type=int, default=50, help=f"random models, {RUNS} runs each (default 50)")
    parser.add_argument("--prompts", type=int, default=50, help="problems for the demo checkpoint (default 50)")
    parser.add_argument("--checkpoint", default="demo", help="another checkpoint with the demo's tokenizer")
    parser.add_argument("--json", type=Path, default=OUT, help="where the figures go")
    return run(check, parser.parse_args(), "interrupted; no figures were written")


if __name__ == "__main__":
    sys.exit(main())
