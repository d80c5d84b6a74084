"""Calibration finds a setting that agrees with `full`, and the bundle decodes with it from then on."""

import json
from pathlib import Path
from typing import Any

import pytest

import runtime
from engines.bundle import Bundle
from engines.errors import OptionError
from runtime.evaluation.calibrate import VALUES, calibrate, fitting, keep, prompts
from runtime.evaluation.intervals import agreement
from tests.support.cases import refused

ASKED = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5]]


@pytest.fixture
def model(bundle_copy: Path) -> Any:
    with runtime.load(bundle_copy, "onnxruntime", threads=1) as loaded:
        yield loaded


@pytest.mark.slow
def test_the_setting_keeps_the_target_and_becomes_the_default(model: runtime.Runtime) -> None:
    trials = list(calibrate(model, 0.05, ASKED, 24))
    chosen = trials[-1]
    assert chosen.agreement >= 0.05 and chosen in trials[:-1]
    assert len({tuple(trial.options.items()) for trial in trials}) == len(trials) - 1, "nothing is tried twice"
    expected = [model.generate(prompt, "full", gen_length=24).ids for prompt in ASKED]
    outs = [model.generate(prompt, "elastic", gen_length=24, **chosen.options) for prompt in ASKED]
    same = [agreement(out.ids, ids) for out, ids in zip(outs, expected, strict=True)]
    assert chosen.agreement == pytest.approx(sum(same) / len(same))
    keep(model, 0.05, trials, 24, len(ASKED))
    Bundle.open(model.bundle.root).check()
    evidence = json.loads((model.bundle.root / "calibration.json").read_text())
    assert evidence["chosen"]["options"] == chosen.options and len(evidence["trials"]) == len(trials) - 1
    with runtime.load(model.bundle.root, "onnxruntime", threads=1) as again:
        assert [again.generate(prompt, gen_length=24).ids for prompt in ASKED] == [out.ids for out in outs]


def test_a_target_out_of_reach_is_refused(model: runtime.Runtime) -> None:
    with refused(OptionError, "agrees with full", "less than 100.00%", "lower --target-agreement"):
        list(calibrate(model, 1.0, [[5] * 9, [8, 8, 1]], 24))
    for target in (0.0, 1.5):
        with refused(OptionError, "target-agreement", "(0, 1]", str(target)):
            list(calibrate(model, target, ASKED, 8))
    with refused(OptionError, "at least one prompt"):
        list(calibrate(model, 0.5, [], 8))


def test_settings_fit_the_bundle(model: runtime.Runtime) -> None:
    for window in VALUES["window"]:
        for max_masks in VALUES["max_masks"]:
            found = fitting(model, {"window": window, "max_masks": max_masks})
            assert found["window"] <= model.bundle.capacity.window
            assert found["max_masks"] is None or found["max_masks"] >= 2 * found["window"]


def test_prompts_are_not_those_of_an_evaluation() -> None:
    assert len(set(prompts(40))) == 40 and prompts(4) == prompts(40)[:4]
