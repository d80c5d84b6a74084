"""What a run did, as pictures: refreshed layers, drift numbers, window, commits and tracked tokens, step by step.

Everything is read from the step events, which `generate --trace` writes too.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.bench.plots import figure, save
from runtime.decoding.controller import StepEvent


def computed(trace: list[StepEvent], layers: int) -> NDArray[np.int64]:
    """[L, steps]: 2 where a layer ran over the whole sequence, 1 where it ran the active rows."""
    found = np.ones((layers, len(trace)), np.int64)
    for event in trace:
        if not event.sigma:
            found[:, event.step] = 2
        elif event.trigger is not None:
            found[event.trigger + 1 :, event.step] = 2
    return found


def similarity(trace: list[StepEvent], layers: int) -> NDArray[np.float64]:
    """[L, steps]: sigma, NaN where a layer was not tested."""
    found = np.full((layers, len(trace)), np.nan)
    for event in trace:
        found[: len(event.sigma), event.step] = event.sigma
    return found


def plot(trace: list[StepEvent], layers: int, gamma: float, file: Path) -> None:
    """Four panels over the steps, as PNG."""
    chart = figure(11, 7)
    (upper, right), (lower, last) = chart.subplots(2, 2)
    steps = np.arange(len(trace))
    upper.imshow(computed(trace, layers), aspect="auto", cmap="Blues", vmin=0, vmax=2, interpolation="nearest")
    upper.set(title="layers run over the active rows (light) and over all (dark)", xlabel="step", ylabel="layer")
    for layer, sigma in enumerate(similarity(trace, layers)):
        right.plot(steps, sigma, marker=".", label=f"layer {layer}", color=f"C{layer % 10}")
    right.axhline(gamma, color="black", linestyle="--", linewidth=1, label=f"gamma {gamma:g}")
    right.set(title="drift similarity", xlabel="step", ylabel="sigma")
    right.legend(fontsize=7, ncols=2)
    for event in trace:
        lower.vlines(event.step, event.window[0], event.window[-1], color="C0", alpha=0.3, linewidth=4)
        lower.plot([event.step] * len(event.tracked), event.tracked, "C1x", markersize=4)
        lower.plot([event.step] * len(event.committed), event.committed, "C2.", markersize=4)
    marks = (("C0-", "window"), ("C2.", "committed"), ("C1x", "tracked afterwards"))
    lower.legend([lower.plot([], [], style)[0] for style, _ in marks], [name for _, name in marks], fontsize=7)
    lower.set(title="positions", xlabel="step", ylabel="position")
    last.bar(steps, [len(event.committed) for event in trace])
    last.set(title="commits", xlabel="step", ylabel="tokens")
    save(chart, file)
