"""The breakdown of a step: its slices add up, and it leaves other users of the model alone."""

from pathlib import Path

import numpy as np

import runtime
from engines.errors import BackendError, OptionError
from runtime.bench.breakdown import SLICES, break_down, rows
from runtime.bench.cases import prompts
from tests.support.cases import refused


def test_a_profile_adds_up(model: runtime.Runtime) -> None:
    """The slices of each kind of step are its time; timing does not change the steps."""
    drawn = [prompt for prompt, _ in prompts(model, 3, 150)]
    for gamma, kind in ((0.5, "reuse"), (0.999, "refresh")):
        found = break_down(model, drawn, 32, "elastic", {"gamma": gamma})
        plain = [model.generate(prompt, gen_length=32, gamma=gamma) for prompt in drawn]
        assert sum(slices["steps"] for slices in found.values()) == sum(out.steps for out in plain)
        assert found["first"]["steps"] == 3 and found[kind]["steps"] > 0
        for slices in found.values():
            assert all(slices[name] >= 0 for name in SLICES if name != "Python"), slices
            assert slices["layers"] > slices["sampling"]
    assert [line[0] for line in rows(found)] == list(SLICES)


def test_a_profile_leaves_a_running_answer_alone(model: runtime.Runtime) -> None:
    expected = model.generate("Hi", gen_length=16).ids
    events = model.stream("Hi", gen_length=16)
    next(events)
    with refused(BackendError, "in use"):
        break_down(model, ["Hi"], 16, "elastic", {})
    *_, out = events
    assert out.ids == expected  # type: ignore[union-attr]


def test_a_profile_needs_engines_that_run_one_by_one(bundle: Path) -> None:
    with (
        runtime.load(bundle, "eager", threads=1) as eager,
        refused(OptionError, "eager does not run its engines one by one", "another back end"),
    ):
        break_down(eager, [np.array([1, 2])], 8, "elastic", {})
