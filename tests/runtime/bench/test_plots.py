"""Plots of a run agree with its events."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

import runtime
from engines.errors import OptionError
from runtime.bench.cases import plot
from runtime.bench.plots import check_plot, computed, plot_trace, sigma_by_layer
from runtime.cli import main
from runtime.decoding.events import StepEvent
from tests.support.cases import refused


def test_what_each_layer_computed(golden: runtime.Runtime) -> None:
    out = golden.generate([3, 1, 4, 1, 5], gen_length=32, window=8, gamma=0.97)
    layers = golden.bundle.config.layers
    ran, sigma = computed(out.trace, layers), sigma_by_layer(out.trace, layers)
    assert ran.shape == sigma.shape == (layers, out.steps) and (ran[:, 0] == 2).all()
    assert {event.trigger is None for event in out.trace[1:]} == {True, False}, "steps of both kinds"
    for event in out.trace[1:]:
        last = layers - 1 if event.trigger is None else event.trigger
        assert (ran[: last + 1, event.step] == 1).all() and (ran[last + 1 :, event.step] == 2).all()
        assert np.array_equal(~np.isnan(sigma[:, event.step]), np.arange(layers) <= last)
        assert event.refreshed == (ran[:, event.step] == 2).any()
    assert all(not event.refreshed for event in out.trace if event.trigger == layers - 1), "no layer follows the last"
    whole = golden.generate([3, 1, 4, 1, 5], gen_length=32, window=8, gamma=0.97, refresh_start="first").trace
    assert any(event.refreshed for event in whole)
    for event in whole[1:]:
        assert (computed(whole, layers)[:, event.step] == (1 if event.trigger is None else 2)).all()


def drawn(monkeypatch: pytest.MonkeyPatch, draw: Any) -> Any:
    """The matplotlib figure that `draw` would save."""
    kept: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: kept.append(self))
    draw()
    kept[0].draw_without_rendering()
    return kept[0]


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 4, 32])
def test_a_trace_is_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    """For any number of layers: every panel has a title and labels, and no legend lies on a panel."""
    steps = [([], None), ([0.95] * layers, None), ([0.95, 0.8][-layers:], min(1, layers - 1))]
    starts = [None if trigger is None or trigger + 1 == layers else trigger + 1 for _, trigger in steps]
    trace = [
        StepEvent(n, 8, sigma, trigger, start, [4, 5], [4], [1], [1.0], [2], 8, 1.0, 1.0)
        for n, ((sigma, trigger), start) in enumerate(zip(steps, starts, strict=True))
    ]
    figure = drawn(monkeypatch, lambda: plot_trace(trace, layers, 0.9, tmp_path / "trace.png"))
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert len(panels) == 4 and all(axes.get_xlabel() and axes.get_ylabel() for axes in panels)
    assert figure.get_suptitle() == f"3 steps, {int(layers > 2)} with a refresh"
    (legend,) = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    box = legend.get_window_extent()
    assert not any(axes.patch.get_window_extent().overlaps(box) for axes in figure.axes)
    (right,) = [axes for axes in panels if axes.get_title() == "drift tests (red: below gamma 0.9)"]
    assert right.images[0].get_array().shape == (layers, 3) and len(right.lines) == 1, "rows, not a line for each layer"
    assert right.lines[0].get_xydata().tolist() == [[2, min(1, layers - 1)]]


@pytest.mark.slow
def test_bars_have_the_quartiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"problems": 3, "tokens_per_second": 70.0, "exact_match": 0.5}
    rows = [
        row | {"case": f"case {n}", "times_faster": 2.0 * n, "times_faster_quartiles": [n, 3.0 * n]} for n in (1, 2)
    ]
    figures = {"cases": rows, "baseline": "case 1", "prompt_length": 500, "gen_length": 64}
    figure = drawn(monkeypatch, lambda: plot(figures, tmp_path / "bench.png"))
    (axes,) = figure.axes
    assert axes.get_title() == "3 problems, prompts of 500 tokens, 64 masks" and "case 1" in axes.get_xlabel()
    (errors,) = axes.collections
    assert sorted(segment[:, 0].tolist() for segment in errors.get_segments()) == [[1.0, 3.0], [2.0, 6.0]]
    width = figure.canvas.get_width_height()[0]
    assert all(text.get_window_extent().x1 < width for text in axes.texts), "labels are not cut off"


def test_plots_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (None, tmp_path / "a.png", tmp_path / "below" / "a.svg", tmp_path / "a.pdf"):
        check_plot(file)
    (tmp_path / "mine.png").write_text("# mine")
    for name, words in (("a.txt", "ending '.txt'"), ("a", "ending ''"), ("mine.png", "something else")):
        with refused(OptionError, name, words, "choose another --plot, ending in .png, .svg, .pdf"):
            check_plot(tmp_path / name)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with refused(OptionError, "plots need matplotlib", "pip install 'elastic-diffusion[plot]'"):
        check_plot(tmp_path / "a.png")


@pytest.mark.slow
def test_drawing(golden: runtime.Runtime, tmp_path: Path) -> None:
    out = golden.generate([3, 1, 4], gen_length=16, window=8)
    plot_trace(out.trace, golden.bundle.config.layers, 0.9, tmp_path / "deep" / "trace.png")
    assert (tmp_path / "deep" / "trace.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.slow
def test_the_command(text_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, events = tmp_path / "t.png", tmp_path / "t.jsonl"
    argv = ["trace", str(text_bundle), "--backend", "onnxruntime", "--prompt", "a", "--gen-length", "8"]
    assert main([*argv, "--plot", str(file), "--out", str(events)]) == 0
    assert "steps" in capsys.readouterr().out and file.stat().st_size > 1000 and events.read_text().count("\n") > 0
    assert main([*argv, "--policy", "full"]) == 2
    assert "trace draws the policy elastic" in capsys.readouterr().err
    for bad in (tmp_path / "t.xyz", file / "below" / "t.png", tmp_path, tmp_path / "t"):
        assert main([*argv, "--plot", str(bad)]) == 2
        assert f"cannot write {bad}" in capsys.readouterr().err
