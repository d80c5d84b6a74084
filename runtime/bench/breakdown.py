"""Where the time of a step goes: engines by kind, drift test and probe, dispatch, cache upkeep, sampling, Python.

Engines are timed around each run; dispatch is what a run costs that does next to
nothing (one id embedded), and is taken off the engines. Steps are told apart:
the first computes everything, a refresh everything from a layer on, or masks that
have come into sight.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from engines.errors import OptionError
from engines.model import Model
from runtime.api import Runtime
from runtime.bench.plots import figure, save
from runtime.decoding.controller import Controller, StepEvent
from runtime.decoding.generate import stream
from runtime.decoding.policies import make_policy
from runtime.decoding.request import Request

KINDS = ("first", "reuse", "refresh")
SLICES = ("layers", "drift test and probe", "embed and head", "dispatch", "cache upkeep", "sampling", "Python")


class TimedController(Controller):
    """Notes the seconds of its own work."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.clock: dict[str, float] = defaultdict(float)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.clock[name] += time.perf_counter() - began

    def _bring_to_front(self, *args: Any) -> None:
        with self.timed("cache upkeep"):
            super()._bring_to_front(*args)

    def _choose(self, *args: Any) -> Any:
        with self.timed("sampling"):
            return super()._choose(*args)


def profile(model: Runtime, prompts: Iterable[Any], gen_length: int, policy: str, options: dict[str, Any]) -> Any:
    """Mean milliseconds of each slice of a step, {kind: {"steps": …, slice: …}}, over all prompts.

    Raises OptionError on a back end that does not run its engines one by one.
    """
    chosen = make_policy(policy, options, model.bundle.manifest.defaults)
    totals: dict[str, dict[str, float]] = {kind: defaultdict(float) for kind in KINDS}
    once = dispatch(model.model)
    for prompt in prompts:
        made: list[TimedController] = []

        def make(*args: Any, made: list[TimedController] = made) -> Controller:
            made.append(TimedController(*args))
            return made[0]

        spent = Snapshot(model.model, made)
        for event in stream(model.model, Request(prompt, gen_length=gen_length), chosen, None, make):
            if isinstance(event, StepEvent):
                more = event.rows > event.active * model.bundle.config.layers
                kind = "first" if event.step == 0 else "refresh" if more else "reuse"
                for name, seconds in spent.since(event, once).items():
                    totals[kind][name] += seconds
                totals[kind]["steps"] += 1
    if not model.model.runs:
        raise OptionError(f"{model.backend} does not run its engines one by one; profile another back end")
    return {
        kind: {"steps": int(found["steps"])} | {s: 1e3 * found[s] / found["steps"] for s in SLICES}
        for kind, found in totals.items()
        if found["steps"]
    }


class Snapshot:
    """What engines and controller have spent between two steps."""

    def __init__(self, model: Model, made: list[TimedController]):
        self.model, self.made = model, made
        self.seconds, self.runs, self.clock = dict(model.seconds), dict(model.runs), dict[str, float]()

    def since(self, event: StepEvent, once: float) -> dict[str, float]:
        now, clock = self.model.seconds, self.made[0].clock
        spent = dict.fromkeys(SLICES, 0.0)
        for part, seconds in now.items():
            runs = self.model.runs[part] - self.runs.get(part, 0)
            spent[slice_of(part)] += seconds - self.seconds.get(part, 0.0) - once * runs
            spent["dispatch"] += once * runs
        for name, seconds in clock.items():
            spent[name] += seconds - self.clock.get(name, 0.0)
        spent["Python"] = event.seconds - sum(spent.values())
        self.seconds, self.runs, self.clock = dict(now), dict(self.model.runs), dict(clock)
        return spent


def slice_of(part: str) -> str:
    if part in ("embed", "head"):
        return "embed and head"
    return "layers" if part.startswith("layer_") or part == "reuse" else "drift test and probe"


def dispatch(model: Model, runs: int = 200) -> float:
    """Seconds of an engine run that does next to nothing: the median over `runs` of embedding one id."""
    with model.exclusive():
        runner, found = model.new_runner(1), []
        for _ in range(runs):
            before = model.seconds.get("embed", 0.0)
            runner.embed(np.zeros(1, np.int64))
            runner.hidden(0, 1)  # a walk may put off what nobody asks for
            found.append(model.seconds.get("embed", 0.0) - before)
    return float(np.median(found))


def rows(found: dict[str, dict[str, float]]) -> list[list[str]]:
    """The profile as a table: a line for each slice, milliseconds and share for each kind of step."""
    table = []
    for name in SLICES:
        cells = []
        for slices in found.values():
            total = sum(slices[s] for s in SLICES)
            cells.append(f"{slices[name]:.3f} ({slices[name] / total:.1%})")
        table.append([name, *cells])
    return table


def plot(found: dict[str, dict[str, float]], file: Path) -> None:
    """Stacked bars, one for each kind of step, each as a share of its time, as PNG."""
    chart = figure(8, 0.7 * len(found) + 1.6)
    axes = chart.subplots()
    left = np.zeros(len(found))
    totals = np.array([sum(slices[s] for s in SLICES) for slices in found.values()])
    labels = [f"{kind}\n{total:.2f} ms" for kind, total in zip(found, totals, strict=True)]
    for name in SLICES:
        share = np.array([slices[name] for slices in found.values()]) / totals
        axes.barh(labels, share, left=left, label=name)
        left += share
    axes.set_xlabel("share of a step")
    axes.invert_yaxis()
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25 - 0.1 / len(found)), frameon=False)
    save(chart, file)
