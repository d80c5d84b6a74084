"""Plots: a figure and its file, and the picture of a run.

matplotlib (the extra `plot`) is imported when the first figure is made. The picture of a run is drawn from its step
events, which `generate --trace` writes too.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import INSTALL, OptionError
from engines.files import writing
from runtime.decoding.events import StepEvent
from runtime.outputs import PLOTS, check_output

REMEDY = f"choose another --plot, ending in {', '.join(PLOTS)}"


def figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches; raises OptionError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError(
            f"plots need matplotlib, which is not installed; {INSTALL.format(extra='plot')}, or leave --plot out"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def check_plot(file: Path | None) -> None:
    """Raise OptionError unless a plot can be drawn to `file`: matplotlib is there, and so is a place for it."""
    if file is None:
        return
    figure(1, 1)
    if file.suffix not in PLOTS:
        raise OptionError(f"cannot write {file} (no plot has the ending {file.suffix!r}); {REMEDY}")
    check_output(file, PLOTS[file.suffix], REMEDY)


def save(chart: Any, file: Path) -> None:
    """Write a figure in the format of the file's ending; raises OptionError if it cannot be written."""
    check_plot(file)
    with writing(file, REMEDY):
        file.parent.mkdir(parents=True, exist_ok=True)
        chart.savefig(file, dpi=130)


def computed(trace: list[StepEvent], layers: int) -> NDArray[np.int64]:
    """[L, steps]: 2 if a layer ran over the whole sequence, 1 if it ran over the active rows."""
    found = np.ones((layers, len(trace)), np.int64)
    for event in trace:
        if not event.sigma:
            found[:, event.step] = 2
        elif event.refreshed_from is not None:
            found[event.refreshed_from :, event.step] = 2
    return found


def sigma_by_layer(trace: list[StepEvent], layers: int) -> NDArray[np.float64]:
    """[L, steps] float64: sigma, NaN if the layer was not tested."""
    found = np.full((layers, len(trace)), np.nan)
    for event in trace:
        found[: len(event.sigma), event.step] = event.sigma
    return found


def plot_trace(trace: list[StepEvent], layers: int, gamma: float, file: Path) -> None:
    """Draw four panels over the steps: layers computed, sigma, positions, and commits."""
    chart = figure(11, 7)
    triggers = [(event.step, event.trigger) for event in trace if event.trigger is not None]
    chart.suptitle(f"{len(trace)} steps, {sum(event.refreshed for event in trace)} with a refresh")
    (upper, right), (lower, last) = chart.subplots(2, 2)
    steps = np.arange(len(trace))
    upper.imshow(computed(trace, layers), aspect="auto", cmap="Blues", vmin=0, vmax=2, interpolation="nearest")
    upper.set(title="layers run over the active rows (light) and over all (dark)", xlabel="step", ylabel="layer")
    sigma = sigma_by_layer(trace, layers)
    image = right.imshow(sigma, aspect="auto", vmin=np.nanmin(sigma, initial=gamma), vmax=1, interpolation="nearest")
    chart.colorbar(image, ax=right, label="sigma")
    right.plot(*zip(*triggers, strict=True) if triggers else ([], []), "rx", markersize=5)
    right.set(title=f"drift tests (red: below gamma {gamma:g})", xlabel="step", ylabel="layer")
    for event in trace:
        lower.vlines(event.step, event.window[0], event.window[-1], color="C0", alpha=0.3, linewidth=4)
        lower.plot([event.step] * len(event.tracked), event.tracked, "C1x", markersize=4)
        lower.plot([event.step] * len(event.committed), event.committed, "C2.", markersize=4)
    marks = (("C0-", "window"), ("C2.", "committed"), ("C1x", "tracked afterwards"))
    lower.legend(
        [lower.plot([], [], style)[0] for style, _ in marks], [name for _, name in marks], fontsize=7, ncols=3,
        loc="upper center", bbox_to_anchor=(0.5, -0.15), frameon=False,
    )  # fmt: skip
    lower.set(title="positions", xlabel="step", ylabel="position")
    last.bar(steps, [len(event.committed) for event in trace])
    last.set(title="commits", xlabel="step", ylabel="tokens")
    save(chart, file)
