"""Timings of policies and back ends on the same problems, interleaved in one process.

Every problem is decoded by every case before the next problem, so that a change in the machine's load affects all
cases alike; ratios are taken problem by problem. A case warms up before each problem, because the case before it has
filled the processor's caches and its threads still spin. Exact match stands beside each figure.
"""

import json
import platform
import random
import resource
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engines.errors import OptionError
from engines.files import writing
from engines.registry import versions
from runtime.api import Runtime
from runtime.bench import breakdown
from runtime.bench.plots import figure, save
from runtime.evaluation import tasks
from runtime.evaluation.exact_match import few_shot_prompt

SEED = 20261122
BLOCK = 32
# Case -> (policy, options): first the paper's greedy baseline, then the control without a cache. `elastic` has the
# bundle's defaults; `elastic-fast` has the baselines' threshold and an unlimited window span; `elastic-paper` has the
# paper's settings: window 16, gamma 0.9, and all masks of the answer from the first step. None lifts a limit.
POLICY_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full-greedy": ("full", {"block_length": BLOCK}),
    "full": ("full", {"block_length": BLOCK, "threshold": 0.9}),
    "prefix": ("prefix", {"block_length": BLOCK, "threshold": 0.9}),
    "dual": ("dual", {"block_length": BLOCK, "threshold": 0.9}),
    "interval": ("interval", {"block_length": BLOCK, "threshold": 0.9}),
    "elastic-paper": (
        "elastic",
        {"threshold": 0.9, "gamma": 0.9, "window": 16, "max_masks": None, "window_span": None},
    ),
    "elastic-fast": ("elastic", {"threshold": 0.9, "window_span": None}),
    "elastic": ("elastic", {}),
}


@dataclass
class Case:
    """One policy on one loaded bundle, and the results of its runs, one entry per problem."""

    name: str
    model: Runtime
    policy: str
    options: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    computed_fraction: list[float] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)

    def warm_up(self) -> None:
        """Decode one short answer without recording it."""
        self.model.generate(np.array([1]), self.policy, gen_length=BLOCK, **self.options)

    def run(self, prompt: Any, problem: tasks.Problem, gen_length: int) -> None:
        """Decode one prompt and record its figures."""
        self.warm_up()
        out = self.model.generate(prompt, self.policy, gen_length=gen_length, **self.options)
        self.seconds.append(out.seconds)
        self.tokens.append(out.tokens)
        self.steps.append(out.steps)
        self.computed_fraction.append(out.computed_fraction)
        self.correct.append(tasks.grade(out.text, problem))

    def figures(self, baseline: "Case") -> dict[str, Any]:
        """Seconds per problem, throughput, exact match, and the median of the paired ratios to `baseline`."""
        ratios = [theirs / ours for ours, theirs in zip(self.seconds, baseline.seconds, strict=True)]
        return {
            "case": self.name, "options": self.options, "problems": len(self.seconds),
            "seconds": {
                "min": min(self.seconds), "mean": statistics.fmean(self.seconds),
                "p50": float(np.percentile(self.seconds, 50)), "p95": float(np.percentile(self.seconds, 95)),
            },
            "tokens_per_second": sum(self.tokens) / sum(self.seconds),
            "tokens": statistics.fmean(self.tokens), "steps": statistics.fmean(self.steps),
            "forwards_per_layer": statistics.fmean(self.steps),  # a step runs each layer once, on few rows or on all
            "computed_fraction": statistics.fmean(self.computed_fraction),
            "exact_match": statistics.fmean(self.correct),
            "seconds_each": [round(seconds, 5) for seconds in self.seconds], "correct_each": self.correct,
            "times_faster": statistics.median(ratios),
            "times_faster_quartiles": [float(np.percentile(ratios, q)) for q in (25, 75)],
        }  # fmt: skip


def cases(models: Sequence[Runtime], names: Iterable[str]) -> list[Case]:
    """Combine every named policy case with every model; raises OptionError for an unknown name."""
    found = []
    for name in names:
        if name not in POLICY_CASES:
            raise OptionError(f"unknown bench case {name!r}; choose from {', '.join(POLICY_CASES)}")
        policy, options = POLICY_CASES[name]
        found += [Case(f"{model.backend} {name}", model, policy, options) for model in models]
    return found


def prompts(model: Runtime, count: int, length: int, seed: int = 0) -> Iterator[tuple[Any, tasks.Problem]]:
    """Draw `count` held-out problems, each with the ids [P] of its few-shot prompt of at most `length` tokens."""
    rng = random.Random(SEED + seed)
    for problem in tasks.in_turn(rng, "test", count):
        yield few_shot_prompt(model, problem, length, rng), problem


def bench(measured: list[Case], count: int, prompt_length: int, gen_length: int) -> Iterator[int]:
    """Decode problem by problem; yields the number of finished problems."""
    if count < 1:
        raise OptionError(f"limit must be at least 1, got {count}")
    for case in measured:  # else the first problem includes the cost of what is allocated once
        case.warm_up()
    for number, (prompt, problem) in enumerate(prompts(measured[0].model, count, prompt_length), 1):
        for case in measured:
            case.run(prompt, problem, gen_length)
        yield number


def report(measured: list[Case], baseline: str, prompt_length: int, gen_length: int) -> dict[str, Any]:
    """All figures of a finished bench; ratios refer to the case `baseline`, or to the first case if it did not run."""
    reference = next((case for case in measured if case.name == baseline), measured[0])
    models = list({id(case.model): case.model for case in measured}.values())
    return machine(models) | {
        "baseline": reference.name, "prompt_length": prompt_length, "gen_length": gen_length,
        "cases": [case.figures(reference) for case in measured],
    }  # fmt: skip


def machine(models: Sequence[Runtime]) -> dict[str, Any]:
    """What the figures hold for: command, devices, bundle, platform, versions, and peak resident memory in GiB."""
    return {
        "command": "python -m runtime " + " ".join(sys.argv[1:]),
        "devices": {model.backend: model.model.device for model in models},
        "bundle": models[0].bundle.identity, "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }  # fmt: skip


def plot(figures: dict[str, Any], file: Path) -> None:
    """Draw bars of tokens per second with exact match; the breakdown, if measured, goes to a second file."""
    if "breakdown" in figures:
        breakdown.plot(figures["breakdown"], file.with_stem(f"{file.stem}_breakdown"))
    rows = figures["cases"][::-1]
    chart = figure(8, 0.45 * len(rows) + 1.2)
    axes = chart.subplots()
    bars = axes.barh([row["case"] for row in rows], [row["tokens_per_second"] for row in rows], color="tab:blue")
    labels = [f"{row['times_faster']:.1f}x, {row['exact_match']:.0%} correct" for row in rows]
    axes.bar_label(bars, labels, padding=4)
    axes.set_xlabel(f"tokens per second, ratios to {figures['baseline']}")
    axes.margins(x=0.25)
    save(chart, file)


def check_file(file: Path | None) -> None:
    """Raise OptionError for an existing file that does not hold figures: it would be overwritten."""
    if file is None or not file.exists():
        return
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or "command" not in content:
        raise OptionError(f"{file} holds something else than figures of a bench; choose another --json")


def write(figures: dict[str, Any], file: Path) -> None:
    """Write figures as indented JSON; raises OptionError if the file cannot be written."""
    with writing(file, "choose another --json"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(figures, indent=1) + "\n")
