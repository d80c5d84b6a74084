"""What a runner promises, on every back end of the CPU."""

import numpy as np

import runtime
from engines.eager.model import EagerRunner
from engines.ort.prefix import PrefixRows
from engines.ort.runner import OnnxRuntimeRunner
from engines.runner import DriftInputs, LayerwiseRunner, SequenceRunner

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def test_runners_are_complete() -> None:
    """Every runner defines all methods of its base class, itself or with a class for prefixes."""
    assert {"permute", "embed", "layer", "run_layers", "reuse", "head", "logits"} <= SequenceRunner.__abstractmethods__
    assert {"save_previous", "drift", "probe"} <= LayerwiseRunner.__abstractmethods__
    for cls, hooks in (
        (EagerRunner, LayerwiseRunner.__abstractmethods__),
        (OnnxRuntimeRunner, SequenceRunner.__abstractmethods__),
    ):
        own = {name for one in (cls, PrefixRows) if one in cls.__mro__ for name in vars(one)}
        assert not cls.__abstractmethods__ and hooks <= own


def test_short_sequences_have_slots_for_all_rows(model: runtime.Runtime) -> None:
    """Fewer positions than the engines' rows: where slots are left, they are dummies."""
    runner = model.model.new_runner(5)
    assert runner.length == 5 and runner.slots == (
        model.bundle.capacity.rows if isinstance(runner, LayerwiseRunner) else 5
    )
    out = model.generate([7], gen_length=1)
    assert out.steps == 1 and len(out.sequence) == 2


def test_the_last_layer_serves_the_logits_rows(model: runtime.Runtime) -> None:
    """Their predictions do not depend on whether other rows have any."""
    runner, logits_rows = model.model.new_runner(40), np.array([30, 4, 17])
    runner.embed(np.arange(40))
    runner.run_layers(40, None)
    expected = runner.logits(logits_rows)
    runner.embed(np.arange(40))
    runner.run_layers(40, None, logits_rows=logits_rows)
    gap = np.abs(runner.logits(logits_rows) - expected)
    print(f"max {gap.max():.2e} mean {gap.mean():.2e}")
    assert gap.max() < 1e-4


def test_predictions_move_with_their_rows(model: runtime.Runtime) -> None:
    runner, first = model.model.new_runner(20), np.arange(4)
    runner.embed(np.arange(20))
    runner.run_layers(20, None)
    runner.embed(np.arange(30, 36))
    runner.reuse(6, DriftInputs("row", first, first, np.arange(runner.slots) < 20, first), 0.0)
    before = runner.head(first)[0]
    runner.permute(np.array([0, 10]), np.array([10, 0]))
    after = runner.head(first)[0]
    assert np.array_equal(after, runner.logits(first).argmax(-1)) and np.array_equal(after[1:], before[1:])
    assert runner.head(np.array([10]))[0] == before[0]


def test_moves_are_as_if_at_once(model: runtime.Runtime) -> None:
    """A cycle of slots: no row is overwritten before it is read."""
    runner = model.model.new_runner(6)
    runner.embed(np.array([10, 11, 12, 13, 14, 15]))
    before = runner.hidden(0, 6)
    runner.permute(np.array([0, 1, 2, 4]), np.array([4, 0, 1, 2]))
    assert np.array_equal(runner.hidden(0, 6), before[[4, 0, 1, 3, 2, 5]])
    runner.permute(np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert np.array_equal(runner.hidden(0, 6), before[[4, 0, 1, 3, 2, 5]])
