"""Reuse passes of several sequences as one, on the fake GPU: the decisions of each alone, one launch and one wait."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import runtime
from engines.errors import BackendError
from engines.gpu.batch import Batch, pass_size
from engines.runner import ReuseResult
from engines.signatures.gpu import DRIFTS
from runtime.decoding.generate import Output, stream_batch
from runtime.decoding.policies import make_policy
from runtime.decoding.request import Request
from tests.support.cases import refused
from tests.support.fake_gpu import fake_gpu
from tests.support.gpu_models import RAGGED, batch_of, caches, device, passes_of, poison, step_counts
from tests.support.runs import assert_same, near

options = st.fixed_dictionaries(
    {
        "gen_length": st.integers(1, 24), "window": st.integers(1, 8), "threshold": st.floats(0.05, 1.0),
        "gamma": st.floats(0.5, 0.999), "drift": st.sampled_from(DRIFTS), "track_num": st.integers(1, 2),
        "block_caching": st.booleans(), "refresh_scope": st.sampled_from(("all", "near")),
        "refresh_start": st.sampled_from(("next", "first")),
        "eos_id": st.sampled_from((250, 30, (12, 30, 7))), "max_masks": st.sampled_from((None, 16)),
        "window_span": st.sampled_from((None, 4)),
    }
)  # fmt: skip
prompts = st.lists(st.lists(st.integers(0, 249), min_size=1, max_size=40), min_size=2, max_size=6)


# Decisions of each sequence


@pytest.mark.slow
@settings(max_examples=40)
@given(prompts, options)
@example([[1], [2, 3], [4] * 9], {"gen_length": 16, "window": 4, "gamma": 0.9, "block_caching": False})
@example(RAGGED, {"gen_length": 16, "window": 4, "gamma": 0.995, "max_masks": 8, "threshold": 0.3})
def test_ragged_batches(either: runtime.Runtime, prompts: list[list[int]], options: dict[str, Any]) -> None:
    """40 batches on each back end: the tokens, triggers, commits and tracked tokens that each sequence has alone."""
    outs = either.generate_batch(prompts, **options)
    for prompt, out in zip(prompts, outs, strict=True):
        alone = either.generate(prompt, **options)
        if not near(alone, options["gamma"]):
            assert_same(out, alone)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DRIFTS)
def test_every_drift_test(either: runtime.Runtime, kind: str) -> None:
    """With refreshes in between, each of one sequence."""
    chosen: dict[str, Any] = {"gen_length": 24, "window": 4, "gamma": 0.985, "drift": kind, "stop_at_eos": False}
    outs = either.generate_batch(RAGGED, **chosen)
    alone = [either.generate(prompt, **chosen) for prompt in RAGGED]
    for ours, theirs in zip(outs, alone, strict=True):
        if not near(theirs, 0.985):
            assert_same(ours, theirs)
    print(kind, [[e.trigger for e in out.trace[1:9]] for out in outs])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime"])
def test_rows_that_predict_the_next_position(
    dream: Path, backend: str, load: Callable[[Path, str], runtime.Runtime]
) -> None:
    model = load(dream, backend)
    chosen: dict[str, Any] = {"gen_length": 20, "window": 4, "gamma": 0.97, "stop_at_eos": False}
    for ours, prompt in zip(model.generate_batch(RAGGED, **chosen), RAGGED, strict=True):
        alone = model.generate(prompt, **chosen)
        if not near(alone, 0.97):
            assert_same(ours, alone)


@pytest.mark.slow
def test_input_embeddings(either: runtime.Runtime) -> None:
    """Rows of the embedding table in place of their ids: the same runs, alone and side by side; the memory is freed."""
    table = load_file(next(either.bundle.root.glob("onnx/embed*.safetensors")))["wte.weight"]
    ids = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8])
    swapped = ids.copy()
    swapped[[1, 4, 5, 6, 9]] = 256 + np.array([0, 1, 2, 3, 4])
    for policy in ("elastic", "full", "prefix"):
        more: dict[str, Any] = {"gamma": 0.97, "window": 4} if policy == "elastic" else {}
        plain = either.generate(ids, policy, gen_length=24, **more)
        chosen = either.generate(swapped, policy, gen_length=24, embeddings=table[ids[[1, 4, 5, 6, 9]]], **more)
        assert chosen.sequence[12:] == plain.sequence[12:]
        assert [event.tracked for event in chosen.trace] == [event.tracked for event in plain.trace]
    outs = either.generate_batch([swapped, swapped], gen_length=24, embeddings=table[ids[[1, 4, 5, 6, 9]]], window=4)
    alone = either.generate(ids, gen_length=24, window=4)
    assert all(out.sequence[12:] == alone.sequence[12:] for out in outs)
    cuda = device(either)[1]
    owned = len(cuda.owned)
    either.generate(swapped, gen_length=8, embeddings=table[ids[[1, 4, 5, 6, 9]]], window=4)
    either.generate(ids, gen_length=8, window=4)
    assert len(cuda.owned) <= owned


@pytest.mark.slow
def test_draws_and_policies_without_a_drift_test(either: runtime.Runtime) -> None:
    drawn: dict[str, Any] = {"temperature": 0.8, "seed": 3, "window": 4}
    ways: dict[str, dict[str, Any]] = {"elastic": drawn, "prefix": {}, "dual": {}}
    for policy, chosen in ways.items():
        outs = either.generate_batch(RAGGED[:3], policy, gen_length=16, **chosen)
        alone = [either.generate(prompt, policy, gen_length=16, **chosen) for prompt in RAGGED[:3]]
        assert [out.sequence for out in outs] == [out.sequence for out in alone]


@pytest.mark.slow
def test_caches_are_those_of_sequences_alone(model: runtime.Runtime) -> None:
    """Passes leave the same caches behind, not only the same tokens."""
    chosen: dict[str, Any] = {"gen_length": 12, "window": 4, "gamma": 0.5, "stop_at_eos": False, "tokens_per_step": 2}
    model.generate_batch(RAGGED, **chosen)
    batched = [caches(model, batch_row) for batch_row in range(6)]
    for prompt, ours in zip(RAGGED, batched, strict=True):
        model.generate(prompt, **chosen)
        gaps = [float(np.abs(a - b).max()) for a, b in zip(ours, caches(model, 0), strict=True)]
        print("H, Q, K, V differ by", *(f"{gap:.0e}" for gap in gaps))
        assert max(gaps) < 1e-5


# Launches and waits


@pytest.mark.slow
def test_one_launch_and_one_wait_for_all(model: runtime.Runtime) -> None:
    """Nothing drifts at gamma 0. As many engines run as for one sequence: the weights are read once for all."""
    requests = [Request(prompt, 24, stop_at_eos=False) for prompt in RAGGED]
    steps = step_counts(model, requests, gamma=0.0, window=4, tokens_per_step=1, threshold=None)[2:-1]
    assert len(steps) > 10 and (steps[:, :4] == 1).all(), steps
    parts = 3 * model.model.config.layers + 2
    assert (steps[:, 4] == 0).all() and len(batch_of(model).pass_queue.graphs["row", 6]) > parts, "all in the graph"


def test_one_wait_where_engines_cannot_be_captured(bundle: Path, load: Callable[[Path, str], runtime.Runtime]) -> None:
    model = load(bundle, "onnxruntime")
    requests = [Request(prompt, 24, stop_at_eos=False) for prompt in RAGGED]
    steps = step_counts(model, requests, gamma=0.0, window=4, tokens_per_step=1, threshold=None)[2:-1]
    assert len(steps) > 10 and (steps[:, :4] == [1, 0, 6, 6]).all(), steps


@pytest.mark.slow
def test_one_wait_where_rows_differ(model: runtime.Runtime) -> None:
    """Without block caching the masks ahead are active too: more rows than are captured, until few are left."""
    requests = [Request(prompt, length, stop_at_eos=False) for prompt, length in zip(RAGGED, (40, 8, 40, 20, 30, 40),
                                                                                    strict=True)]  # fmt: skip
    for _ in range(2):  # the first round creates contexts for new batch sizes, which waits too
        steps = step_counts(
            model, requests, gamma=0.0, window=4, tokens_per_step=1, threshold=None, block_caching=False
        )
    assert (steps[1:, 0] == 1).all() and (steps[1, 1:4] > 1).all() and (steps[-2, 1:4] == 1).all(), steps


def test_sizes_of_a_pass() -> None:
    for batch_rows in range(1, 33):
        sizes = [pass_size(count, batch_rows) for count in range(1, batch_rows + 1)]
        assert sizes == sorted(sizes) and len(set(sizes)) <= 10 and sizes[-1] == batch_rows
        assert all(count <= size <= max(2, count * 3 / 2) for count, size in enumerate(sizes, 1) if batch_rows > 1)


# Sequences that are over, and those that wait


@pytest.mark.slow
def test_sequences_that_end_early(model: runtime.Runtime) -> None:
    """They are not computed any more: the others move to the front, and passes get smaller until one is left."""
    lengths = 4, 30, 8, 22, 12, 36
    requests = [Request(prompt, n, stop_at_eos=False) for prompt, n in zip(RAGGED, lengths, strict=True)]
    policy = make_policy("elastic", {"gamma": 0.9, "window": 4, "tokens_per_step": 1})
    outs, sizes, batch_rows = {}, set(), set()
    for number, event in stream_batch(model.model, requests, policy, None):
        batch = batch_of(model)
        sizes.add(batch.pass_queue.batch)
        batch_rows.add(tuple(id(runner) for runner in batch.runners))
        assert [runner.batch_row for runner in batch.runners] == list(range(len(batch.runners)))
        if isinstance(event, Output):
            outs[number] = event
    assert sizes >= {6, 4, 3, 2} and len(batch_rows) > 2
    for number, (prompt, length) in enumerate(zip(RAGGED, lengths, strict=True)):
        assert_same(outs[number], model.generate(prompt, gen_length=length, gamma=0.9, window=4, tokens_per_step=1,
                                          stop_at_eos=False))  # fmt: skip


@pytest.mark.slow
def test_idle_batch_rows_affect_no_other(model: runtime.Runtime) -> None:
    """A pass of 5 runs 6 batch rows: the sixth's caches are filled with NaN."""
    chosen: dict[str, Any] = {"gen_length": 16, "window": 4, "gamma": 0.95}
    model.generate_batch(RAGGED, **chosen)
    expected = model.generate_batch(RAGGED[:5], **chosen)
    poison(model, 5)
    for ours, theirs in zip(model.generate_batch(RAGGED[:5], **chosen), expected, strict=True):
        assert_same(ours, theirs)
    assert batch_of(model).pass_queue.graphs["row", 6] is not None
    poison(model, 5)
    for ours, prompt in zip(model.generate_batch(RAGGED, **chosen), RAGGED, strict=True):
        assert_same(ours, model.generate(prompt, **chosen))


def test_an_abandoned_batch(model: runtime.Runtime) -> None:
    """Its sequences are over when the next batch begins: that one runs as one pass, without them."""
    events = model.stream_batch(RAGGED, gen_length=24, window=4)
    for _ in range(20):
        next(events)
    events.close()  # type: ignore[attr-defined]
    requests = [Request(prompt, 12, stop_at_eos=False) for prompt in RAGGED[:3]]
    steps = step_counts(model, requests, gamma=0.0, window=4, tokens_per_step=1, threshold=None)[2:-1]
    assert (steps[:, :4] == 1).all() and batch_of(model).pass_queue.batch == 3, steps


def test_a_sequence_that_waits_is_left_alone(model: runtime.Runtime) -> None:
    """A sequence that is not over and runs no pass in this step: the others run one by one, and it keeps every byte."""
    made, cuda = device(model)
    due = passes_of(model, 4)
    cuda.sync()
    before = caches(model, 2)
    some = [due[0], due[1], due[3]]
    outcomes = made.reuse(some)
    assert all(np.array_equal(a, b) for a, b in zip(before, caches(model, 2), strict=True))
    alone = [due.runner.reuse(due.rows, due.drift_inputs, due.gamma) for due in passes_of(model, 4)]
    for number, ours in zip((0, 1, 3), outcomes, strict=True):
        equal(ours, alone[number])


def equal(ours: ReuseResult, theirs: ReuseResult) -> None:
    assert np.allclose(ours.sigma, theirs.sigma, atol=1e-5) and ours.trigger == theirs.trigger
    assert [p.tolist() for p in ours.probes] == [p.tolist() for p in theirs.probes]


def test_predictions_of_a_batched_pass_are_kept(model: runtime.Runtime) -> None:
    """After a batched pass the head runs again only for rows that it has not predicted."""
    made, cuda = device(model)
    due = passes_of(model, 3)
    made.reuse(due)
    runs = cuda.counts["run"] + cuda.counts["launch"]
    kept = [each.runner.head(each.drift_inputs.logits_rows) for each in due]
    assert cuda.counts["run"] + cuda.counts["launch"] == runs
    for each, (token, confidence) in zip(due, kept, strict=True):
        again, sure = each.runner.head(np.append(each.drift_inputs.logits_rows, 0))
        assert (again[:-1] == token).all() and np.allclose(sure[:-1], confidence, atol=1e-5)
    assert cuda.counts["run"] == runs - cuda.counts["launch"] + 3


@pytest.mark.slow
def test_a_failure_within_a_batch_frees_the_model(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(), runtime.load(bundle, "tensorrt") as model:
        expected = model.generate_batch(RAGGED, gen_length=8, gamma=0.9)
        with monkeypatch.context() as patch:
            patch.setattr(Batch, "reuse", lambda *_: (_ for _ in ()).throw(BackendError("it fails")))
            with refused(BackendError, "it fails"):
                model.generate_batch(RAGGED, gen_length=8)
        for ours, theirs in zip(model.generate_batch(RAGGED, gen_length=8, gamma=0.9), expected, strict=True):
            assert_same(ours, theirs)
    assert not device(model)[1].owned
