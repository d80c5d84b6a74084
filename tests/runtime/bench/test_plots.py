"""Plots of a run agree with its events."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import runtime
from runtime.bench.plots import computed, plot_trace, sigma_by_layer
from runtime.cli import main


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
        assert event.refreshed(layers) == (ran[:, event.step] == 2).any()
    assert not replace(out.trace[1], trigger=layers - 1).refreshed(layers), "no layer follows the last"


@pytest.mark.slow
def test_drawing(golden: runtime.Runtime, tmp_path: Path) -> None:
    out = golden.generate([3, 1, 4], gen_length=16, window=8)
    plot_trace(out.trace, golden.bundle.config.layers, 0.9, tmp_path / "deep" / "trace.png")
    assert (tmp_path / "deep" / "trace.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.slow
def test_the_command(text_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, events = tmp_path / "t.png", tmp_path / "t.jsonl"
    argv = ["trace", str(text_bundle), "--backend", "onnxruntime", "--prompt", "a", "--gen-length", "8"]
    assert main([*argv, "--plot", str(file), "--json", str(events)]) == 0
    assert "steps" in capsys.readouterr().out and file.stat().st_size > 1000 and events.read_text().count("\n") > 0
    assert main([*argv, "--policy", "full"]) == 2
    assert "trace draws the policy elastic" in capsys.readouterr().err
    for bad in (tmp_path / "t.xyz", file / "below" / "t.png", tmp_path, tmp_path / "t"):
        assert main([*argv, "--plot", str(bad)]) == 2
        assert f"cannot write {bad}" in capsys.readouterr().err
