"""A loaded model, whatever the back end: its plain forward pass, one user at a time, a clean end."""

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from engines.errors import BackendError, PromptError
from tests.support.cases import refused

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


# The plain forward


def test_logits(model: runtime.Runtime) -> None:
    one = model.logits(PROMPT)
    assert one.shape == (1, len(PROMPT), 256) and one.dtype == np.float32 and np.isfinite(one).all()
    batch = model.logits(np.array([PROMPT, PROMPT[::-1]], np.int32))
    assert batch.shape == (2, len(PROMPT), 256)
    gap = np.abs(batch[:1] - one)
    print(f"{model.backend}: batch of 2 against 1, max {gap.max():.2e} mean {gap.mean():.2e}")
    assert gap.max() < 1e-4 < np.abs(batch[1] - one[0]).max()
    some = model.model.logits([PROMPT, PROMPT[::-1]], np.array([5, 0]))
    assert some.shape == (2, 2, 256) and np.abs(some - batch[:, [5, 0]]).max() < 1e-4


@pytest.mark.parametrize(
    ("ids", "words"),
    [([], ("non-empty integer array",)), ([[]], ("non-empty integer array",)), ([1.5], ("integer array", "float64")),
     ([[[1]]], ("[B, P]", "[1, 1, 1]")), ([[1, 2], [3]], ("different lengths", "[B, P]")), ("abc", ("integer array",)),
     ([True], ("integer array", "bool")), ([1, 256], ("256", "vocabulary of 256", "check the tokenizer")),
     ([-1], ("-1", "vocabulary of 256", "check the tokenizer")),
     ([0] * 513, ("513 ids", "length 512", "shorten them")), ([10**30], ("integer array", "object"))],
)  # fmt: skip
def test_logits_of_what_is_no_ids(golden: runtime.Runtime, ids: Any, words: tuple[str, ...]) -> None:
    with refused(PromptError, *words):
        golden.logits(ids)


# One process


@pytest.mark.parametrize("attempt", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_model_is_of_its_process(golden: runtime.Runtime, attempt: Any) -> None:
    """Its output is not."""
    for loaded in (golden.model, golden) if attempt is not copy.copy else (golden.model,):
        with refused(BackendError, "cannot be pickled, copied or sent", f"runtime.load({str(golden.bundle.root)!r})"):
            attempt(loaded)
    output = golden.generate(PROMPT, gen_length=4, stop_at_eos=False)
    assert pickle.loads(pickle.dumps(output)).ids == output.ids


# One user at a time


def in_another_thread(work: Any) -> BaseException | None:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    return caught[0] if caught else None


def test_two_threads(model: runtime.Runtime) -> None:
    """While one generates, others get an error at once; afterwards they may use the model."""
    events = model.stream(PROMPT, gen_length=8)
    next(events)
    for work in (lambda: model.generate(PROMPT, gen_length=8), lambda: model.logits(PROMPT)):
        error = in_another_thread(work)
        assert type(error) is BackendError and "in use" in str(error) and "load a second one" in str(error)
    with refused(BackendError, "in use", "finish or close"):  # nor the same thread, twice
        model.generate(PROMPT, gen_length=8)
    *_, out = events
    outcome: list[runtime.Output] = []
    assert in_another_thread(lambda: outcome.append(model.generate(PROMPT, gen_length=8))) is None
    assert isinstance(out, runtime.Output) and outcome[0].ids == out.ids, "the refused calls changed nothing"


def test_a_closed_generation_frees_the_model(model: runtime.Runtime) -> None:
    events = model.stream(PROMPT, gen_length=8)
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert model.generate(PROMPT, gen_length=8).steps > 1


def test_a_failed_request_frees_the_model(model: runtime.Runtime) -> None:
    for _ in range(2):
        with refused(PromptError, "vocabulary", "check the tokenizer"):
            model.generate([999], gen_length=8)
    assert model.logits(PROMPT).shape == (1, 8, 256)


@pytest.mark.parametrize("name", ("onnxruntime", "eager"))
def test_closed(golden_bundle: Path, name: str) -> None:
    with runtime.load(golden_bundle, name, threads=1) as model:
        model.logits(PROMPT)
    model.close()  # twice does nothing
    for work in (lambda: model.logits(PROMPT), lambda: model.generate(PROMPT, gen_length=4)):
        with refused(BackendError, "closed", "load it again"):
            work()


def test_closed_in_the_middle(golden_bundle: Path) -> None:
    model = runtime.load(golden_bundle, "onnxruntime", threads=1)
    events = model.stream(PROMPT, gen_length=16)
    next(events)
    model.close()
    with refused(BackendError, "closed", "load it again"):
        next(events)


# Engines that fail


def test_numbers_that_are_none(golden: runtime.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN confidences commit nothing: without an error decoding would never end."""
    runner = type(golden.model.new_runner(8))
    monkeypatch.setattr(runner, "head", lambda self, rows: (np.zeros(len(rows), int), np.full(len(rows), np.nan)))
    with refused(BackendError, "confidences at step 0 are not finite numbers", "`python -m export verify "):
        golden.generate(PROMPT, gen_length=8)
