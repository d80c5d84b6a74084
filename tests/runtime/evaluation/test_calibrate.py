"""Calibration finds a setting that answers as `full` does, and the bundle decodes with it from then on."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import runtime
from engines.bundle import Bundle
from engines.defaults import CALIBRATION
from engines.errors import OptionError
from export.cli import main as export_main
from runtime.cli import main
from runtime.decoding.policies import make_policy
from runtime.evaluation.calibrate import (
    LEAST,
    SEED,
    VALUES,
    Trial,
    calibrate,
    clearly_faster,
    defaults,
    fitting,
    keep,
    prompts,
    undo,
)
from tests.support.cases import refused
from tests.support.commands import Call

COUNT = 40
Rule = Callable[[int, dict[str, Any]], bool]


class Model:
    """Stands for a bundle whose answers are right by a rule of prompt and options, and whose seconds are known.

    The seconds of a setting grow with its threshold, unless `even`; those of `full` are never asked for.
    """

    def __init__(self, right: Rule, even: bool = False, **kept: Any):
        self.right, self.even, self.kept = right, even, kept
        self.bundle = SimpleNamespace(capacity=SimpleNamespace(window=32))

    def resolve(self, policy: None, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return make_policy(self.kept.get("policy", "elastic"), {}, self.kept), {}

    def generate(self, prompt: int, policy: str, gen_length: int, **options: Any) -> Any:
        right = policy == "full" or self.right(prompt, {"policy": policy} | options)
        seconds = 1.0 if self.even else options.get("threshold", 1.0) ** 8
        return SimpleNamespace(ids=[prompt, 7, 7, 7 if right else 8], seconds=seconds, computed_fraction=0.5)


def run(model: Model, target: float = 0.95, count: int = COUNT) -> list[Trial]:
    return list(calibrate(model, target, list(range(count)), 4))  # type: ignore[arg-type]


def confirming() -> set[int]:
    """The prompts of the half that confirms."""
    return set(random.Random(SEED).sample(range(COUNT), COUNT)[COUNT // 2 :])


def test_the_fastest_setting_that_keeps_the_target() -> None:
    trials = run(Model(lambda prompt, options: options["threshold"] >= 0.95, threshold=0.99))
    chosen = trials[-1]
    assert chosen.half == "confirmation" and chosen.agreement == chosen.tokens == 1.0
    assert chosen.options["threshold"] == 0.95 and chosen in trials[:-1]
    searched = [tuple(trial.options.items()) for trial in trials if trial.half == "search"]
    assert len(set(searched)) >= len(searched) - 1, "only the old defaults may be tried twice"
    assert min(trial.tokens for trial in trials) == 0.75 and min(trial.agreement for trial in trials) == 0.0


def test_whole_answers_are_the_target() -> None:
    """One wrong token in each answer is 75 % of the tokens, and no answer."""
    trials = run(Model(lambda prompt, options: options["threshold"] >= 0.98), target=0.7)
    assert trials[-1].options["threshold"] == 0.98


def test_the_other_half_confirms() -> None:
    """A setting that is right on the prompts it was chosen on, and wrong on the others, is not chosen."""
    others = confirming()
    trials = run(
        Model(lambda prompt, options: options["threshold"] >= (0.97 if prompt in others else 0.8), threshold=0.99)
    )
    assert any(t.half == "search" and t.options["threshold"] == 0.8 and t.agreement == 1.0 for t in trials)
    assert trials[-1].options["threshold"] == 0.97


def test_what_differs_within_noise_does_not_replace_the_defaults() -> None:
    model = Model(lambda prompt, options: True, even=True, threshold=0.93, gamma=0.7)
    chosen = run(model)[-1]
    assert chosen.options == defaults(model) and chosen.options["threshold"] == 0.93  # type: ignore[arg-type]
    assert clearly_faster([0.9] * 9 + [1.1]) and not clearly_faster([0.9] * 8 + [1.1] * 2)
    assert not clearly_faster([0.99] * 20) and not clearly_faster([0.5] * 4) and clearly_faster([0.5] * 5)


def test_defaults_that_miss_the_target_are_replaced() -> None:
    chosen = run(Model(lambda prompt, options: options["threshold"] >= 0.95, threshold=0.6))[-1]
    assert chosen.options["threshold"] == 0.95, "although the defaults are faster"


def test_defaults_that_no_setting_beats_stay() -> None:
    for model in (
        Model(lambda prompt, options: options["policy"] == "dual", policy="dual"),
        Model(lambda prompt, options: options["threshold"] == 0.93, threshold=0.93),
    ):
        assert run(model)[-1].options == defaults(model)  # type: ignore[arg-type]


def test_what_is_refused() -> None:
    with refused(OptionError, "no setting answers as full does in 95.0%", "0.0% and 0.0%", "lower --target-agreement"):
        run(Model(lambda prompt, options: False))
    for target in (0.0, 1.5):
        with refused(OptionError, "target-agreement", "(0, 1]", str(target)):
            run(Model(lambda prompt, options: True), target)
    with refused(OptionError, f"at least {LEAST} prompts", f"got {LEAST - 1}", "--limit"):
        run(Model(lambda prompt, options: True), count=LEAST - 1)


@pytest.fixture
def model(bundle_copy: Path) -> Any:
    with runtime.load(bundle_copy, "onnxruntime", threads=1) as loaded:
        yield loaded


def trial(**options: Any) -> Trial:
    return Trial("confirmation", {"policy": "elastic"} | options, 1.0, 1.0, 0.5, 0.25)


def test_kept_and_undone(model: runtime.Runtime, call: Call) -> None:
    """Each calibration is taken back in turn, with the evidence of the one before."""
    root, before = model.bundle.root, model.bundle.manifest.defaults
    keep(model, 0.95, [trial(gamma=0.5), trial(gamma=0.8)], 24, COUNT)
    first = Bundle.open(root).file(CALIBRATION).read_text()
    assert json.loads(first)["chosen"]["options"] == {"policy": "elastic", "gamma": 0.8}
    with runtime.load(root, "onnxruntime", threads=1) as again:
        assert again.resolve(None, {})[0].gamma == 0.8  # type: ignore[attr-defined]
        keep(again, 0.9, [trial(gamma=0.7, max_masks=64)], 24, COUNT)
    code, out, _ = call(export_main, "inspect", root)
    assert code == 0 and "measured by calibrate: target_agreement 0.9, prompts 40" in out and "'gamma': 0.7" in out
    Bundle.open(root).check()
    code, out, _ = call(main, "calibrate", root, "--undo")
    assert code == 0 and "'gamma': 0.8" in out and "again" in out
    assert Bundle.open(root).file(CALIBRATION).read_text() == first
    assert undo(root) == before == Bundle.open(root).manifest.defaults
    assert "measured" not in call(export_main, "inspect", root)[1]
    with refused(OptionError, "no calibration to undo"):
        undo(root)


def test_defaults_that_stay_are_not_written(model: runtime.Runtime) -> None:
    before = model.bundle.manifest.defaults
    keep(model, 0.95, [trial(**{k: v for k, v in defaults(model).items() if k != "policy"})], 24, COUNT)
    after = Bundle.open(model.bundle.root)
    assert after.manifest.defaults == before and CALIBRATION in after.manifest.files


def test_settings_fit_the_bundle(model: runtime.Runtime) -> None:
    for window in VALUES["window"]:
        for max_masks in VALUES["max_masks"]:
            found = fitting(model, {"window": window, "max_masks": max_masks})
            assert found["window"] <= model.bundle.capacity.window
            assert found["max_masks"] is None or found["max_masks"] >= 2 * found["window"]


def test_prompts_are_not_those_of_an_evaluation() -> None:
    assert len(set(prompts(40))) == 40 and prompts(4) == prompts(40)[:4]
