"""Where the time of a step goes: engines by kind, drift test and probe, dispatch, cache upkeep, sampling, Python.

Engines are timed around each run. Dispatch is the cost of a run that computes next to nothing (one id is embedded); it
is subtracted from the engines. Three kinds of step are counted apart: the first step computes everything; a refresh
runs rows beyond the active set, because a layer triggered or masks were added; all others are reuse steps.
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
from runtime.decoding.controller import Controller
from runtime.decoding.events import StepEvent
from runtime.decoding.generate import stream
from runtime.decoding.policies import make_policy
from runtime.decoding.request import Request

KINDS = ("first", "reuse", "refresh")
SLICES = ("layers", "drift test and probe", "embed and head", "dispatch", "cache upkeep", "sampling", "Python")


class TimedController(Controller):
    """A controller that measures the seconds of its own work."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.clock: dict[str, float] = defaultdict(float)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the body's seconds to the clock `name`."""
        began = time.perf_counter()
        yield
        self.clock[name] += time.perf_counter() - began

    def _bring_to_front(self, *args: Any) -> None:
        with self.timed("cache upkeep"):
            super()._bring_to_front(*args)

    def _choose(self, *args: Any) -> Any:
        with self.timed("sampling"):
            return super()._choose(*args)


def break_down(
    model: Runtime, prompts: Iterable[Any], gen_length: int, policy: str, options: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Measure the mean milliseconds of each slice of a step over all prompts: {kind: {"steps": …, slice: …}}.

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
        raise OptionError(f"{model.backend} does not run its engines one by one; choose another back end")
    return {
        kind: {"steps": int(found["steps"])} | {s: 1e3 * found[s] / found["steps"] for s in SLICES}
        for kind, found in totals.items()
        if found["steps"]
    }


class Snapshot:
    """The seconds that engines and controller had spent at the end of the last step."""

    def __init__(self, model: Model, made: list[TimedController]):
        self.model, self.made = model, made
        self.seconds, self.runs, self.clock = dict(model.seconds), dict(model.runs), dict[str, float]()

    def since(self, event: StepEvent, once: float) -> dict[str, float]:
        """The seconds of each slice since the last call; `once` is the dispatch of one engine run."""
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
    """The slice to which an engine's time belongs."""
    if part in ("embed", "head"):
        return "embed and head"
    return "layers" if part.startswith("layer_") or part == "reuse" else "drift test and probe"


def dispatch(model: Model, runs: int = 200) -> float:
    """Seconds of an engine run that computes next to nothing: the median over `runs` of embedding one id."""
    with model.exclusive():
        runner, found = model.new_runner(1), []
        for _ in range(runs):
            before = model.seconds.get("embed", 0.0)
            runner.embed(np.zeros(1, np.int64))
            runner.hidden(0, 1)  # a runner may defer the pass until its result is read
            found.append(model.seconds.get("embed", 0.0) - before)
    return float(np.median(found))


def rows(found: dict[str, dict[str, float]]) -> list[list[str]]:
    """The breakdown as a table: a line for each slice, milliseconds and percentage for each kind of step."""
    table = []
    for name in SLICES:
        cells = []
        for slices in found.values():
            total = sum(slices[s] for s in SLICES)
            cells.append(f"{slices[name]:.3f} ({slices[name] / total:.1%})")
        table.append([name, *cells])
    return table


def plot(found: dict[str, dict[str, float]], file: Path) -> None:
    """Draw one stacked bar per kind of step: the fraction of each slice in its time."""
    chart = figure(8, 0.7 * len(found) + 1.6)
    axes = chart.subplots()
    left = np.zeros(len(found))
    totals = np.array([sum(slices[s] for s in SLICES) for slices in found.values()])
    labels = [f"{kind}\n{total:.2f} ms" for kind, total in zip(found, totals, strict=True)]
    for name in SLICES:
        fraction = np.array([slices[name] for slices in found.values()]) / totals
        axes.barh(labels, fraction, left=left, label=name)
        left += fraction
    axes.set(title="where the time of a step goes", xlabel="fraction of a step")
    axes.invert_yaxis()
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25 - 0.1 / len(found)), frameon=False)
    save(chart, file)
