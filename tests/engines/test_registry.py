"""Finding, loading and using back ends: what is missing is named, and a model has one user at a time."""

import importlib.util
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import export
import runtime
from engines import registry as backends
from engines.bundle import Bundle
from engines.errors import BackendError, BundleError, OptionError, ParityError, PromptError
from engines.ort.model import OnnxRuntimeModel, share_threads
from engines.ort.runner import OnnxRuntimeRunner
from engines.registry import BACKENDS, available
from engines.runner import DriftInputs, LayerwiseRunner, SequenceRunner
from export.verify import verify
from tests.support.cases import DRIFT_PARTS, refused

ON_CPU = ("onnxruntime", "eager")
TENSORRT = ("tensorrt", "tensorrt_rtx")
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module", params=ON_CPU)
def model(request: pytest.FixtureRequest, golden_bundle: Path) -> Iterator[runtime.Runtime]:
    with runtime.load(golden_bundle, request.param, threads=1) as loaded:
        yield loaded


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make packages look as if they were not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name.split(".")[0] in packages else real(name, *a)
    )


# Which back end


def test_the_preferred_one(golden_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, *TENSORRT)
    assert available() == ["onnxruntime", "eager"]
    with runtime.load(golden_bundle) as model:
        assert model.backend == "onnxruntime" and "CPU, 1 threads, onnxruntime" in model.model.device


def test_none_installed(golden_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "onnxruntime", "torch", *TENSORRT)
    assert available() == []
    with refused(BackendError, "no back end is installed", "pip install 'elastic-diffusion[cpu]'"):
        runtime.load(golden_bundle)
    for name, package, extra in (
        ("onnxruntime", "onnxruntime", "cpu"),
        ("eager", "torch", "export"),
        ("tensorrt", "tensorrt or tensorrt_rtx", "gpu"),
    ):
        with refused(BackendError, name, f"needs {package}", f"pip install 'elastic-diffusion[{extra}]'"):
            runtime.load(golden_bundle, name)


def test_the_next_one(golden_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "onnxruntime")
    with runtime.load(golden_bundle, threads=1) as model:
        assert model.backend == "eager"


def test_a_package_that_does_not_import(golden_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "eager", ("engines.no_such_module", "EagerModel", ("torch",), "export"))
    with refused(BackendError, "eager does not load", "no_such_module", "pip install 'elastic-diffusion[export]'"):
        runtime.load(golden_bundle, "eager")


def test_unknown(golden_bundle: Path) -> None:
    with refused(OptionError, "'abacus'", "choose from auto, tensorrt, onnxruntime, eager"):
        runtime.load(golden_bundle, "abacus")


def test_there_but_not_built(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the same as a back end that is not installed."""
    bundle = export.build(tiny_checkpoint, tmp_path / "b", backends=[])
    without(monkeypatch, "torch")
    with refused(BundleError, "no engines for onnxruntime", "python -m export build --backend onnxruntime"):
        runtime.load(bundle)


# Threads


@pytest.mark.parametrize("threads", [0, -1, 10**6])
def test_threads_out_of_range(golden_bundle: Path, threads: int) -> None:
    for name in ON_CPU:
        with refused(OptionError, "threads must lie in 1 …", "cores", str(threads)):
            runtime.load(golden_bundle, name, threads=threads)


def test_one_pool_for_the_process(golden_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    with refused(OptionError, "pool already has 1 threads", "not 3"):
        runtime.load(golden_bundle, "onnxruntime", threads=3)
    assert share_threads(None) == share_threads(1) == 1


# The plain forward


def test_logits(model: runtime.Runtime) -> None:
    one = model.logits(PROMPT)
    assert one.shape == (1, len(PROMPT), 256) and one.dtype == np.float32 and np.isfinite(one).all()
    batch = model.logits(np.array([PROMPT, PROMPT[::-1]], np.int32))
    assert batch.shape == (2, len(PROMPT), 256)
    gap = np.abs(batch[:1] - one)
    print(f"{model.backend}: batch of 2 against 1, max {gap.max():.2e} mean {gap.mean():.2e}")
    assert gap.max() < 1e-4 < np.abs(batch[1] - one[0]).max()


@pytest.mark.parametrize(
    ("ids", "words"),
    [([], ("non-empty integer array",)), ([[]], ("non-empty integer array",)), ([1.5], ("integer array", "float64")),
     ([[[1]]], ("[B, N]", "[1, 1, 1]")), ([[1, 2], [3]], ("different lengths", "[B, N]")), ("abc", ("integer array",)),
     ([True], ("integer array", "bool")), ([1, 256], ("256", "vocabulary of 256", "check the tokenizer")),
     ([-1], ("-1", "vocabulary of 256", "check the tokenizer")),
     ([0] * 513, ("513 ids", "length 512", "--max-length")), ([10**30], ("integer array", "object"))],
)  # fmt: skip
def test_logits_of_what_is_no_ids(golden: runtime.Runtime, ids: Any, words: tuple[str, ...]) -> None:
    with refused(PromptError, *words):
        golden.logits(ids)


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
    """While one generates, others are told so, at once; afterwards they may."""
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


@pytest.mark.parametrize("name", ON_CPU)
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


class Interrupted:
    """A binding that is interrupted right after its n-th value was bound."""

    left = 0

    def __init__(self, binding: Any):
        self.binding = binding

    def __getattr__(self, name: str) -> Any:
        def bind(*values: Any) -> None:
            getattr(self.binding, name)(*values)
            Interrupted.left -= 1
            if Interrupted.left == 0:
                raise KeyboardInterrupt

        return bind


@pytest.mark.parametrize("together", [True, False])
def test_an_interrupted_binding_is_made_again(golden_bundle: Path, together: bool) -> None:
    """Ctrl-C between binding a value and noting it, anywhere in an answer: the next one is as ever."""
    options: dict[str, Any] = {"gen_length": 12, "tokens_per_step": 2, "stop_at_eos": False, "track_num": 2}
    interrupted = 0
    with runtime.load(golden_bundle, "onnxruntime", threads=1) as loaded:
        model = cast(OnnxRuntimeModel, loaded.model)
        if not together:
            del model.sessions["reuse"]
        run = model.run_bound
        expected = loaded.generate(PROMPT, window=4, **options)
        for at in range(1, 200, 13):
            bindings = model.workspaces[0].bindings
            kept = dict(bindings)
            Interrupted.left = at
            bindings.update({part: Interrupted(binding) for part, binding in kept.items()})
            model.run_bound = lambda part, binding: run(part, binding.binding)  # type: ignore[method-assign]
            try:
                loaded.generate([*PROMPT, 7, 7], window=8, **options)
            except KeyboardInterrupt:
                interrupted += 1
            bindings.update(kept)
            model.run_bound = run  # type: ignore[method-assign]
            out = loaded.generate(PROMPT, window=4, **options)
            assert out.sequence == expected.sequence, at
    assert interrupted > 5


# Engines that fail


def test_a_failure_names_the_part(golden: runtime.Runtime) -> None:
    assert isinstance(golden.model, OnnxRuntimeModel)
    with refused(BackendError, "ONNX Runtime failed on embed", "python -m export verify"):
        golden.model.run("embed", ["hidden"], ids=np.array([[999]]))


def test_numbers_that_are_none(golden: runtime.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN confidences commit nothing: without an error decoding would never end."""
    runner = type(golden.model.new_runner(8))
    monkeypatch.setattr(runner, "head", lambda self, rows: (np.zeros(len(rows), int), np.full(len(rows), np.nan)))
    with refused(BackendError, "confidences at step 0 are not numbers", "python -m export verify", "--bf16"):
        golden.generate(PROMPT, gen_length=8)


# Verification of parts


def test_verify_accepts(golden_bundle: Path) -> None:
    rows = list(verify(Bundle.open(golden_bundle), "onnxruntime", 5e-4))
    assert [row.part for row in rows] == [
        "embed", "layer_00", "layer_01", "layer_02", "layer_03", "head", *DRIFT_PARTS, "probe", "forward",
    ]  # fmt: skip
    for row in rows:
        print(f"{row.part}: max {row.max:.2e} mean {row.mean:.2e} cosine {row.cosine:.8f}")
        assert 0 <= row.max < 5e-4 and row.cosine > 1 - 1e-6


@pytest.mark.parametrize(
    ("method", "part"), [("layer", "layer_02"), ("logits", "forward"), ("sigma", "drift_"), ("probes", "probe")]
)
def test_verify_finds_a_wrong_part(
    golden_bundle: Path, monkeypatch: pytest.MonkeyPatch, method: str, part: str
) -> None:
    """One part at a time is made wrong; it is named, with what is made of it, and no other is blamed."""
    hook = method if method in ("layer", "logits") else "reuse"
    real = getattr(OnnxRuntimeRunner, hook)

    def wrong(runner: Any, index: Any, *rest: Any, **named: Any) -> Any:
        result = real(runner, index, *rest, **named)
        if method == "layer":
            runner.h[3, : rest[0]] += 1e-2 * (index == 2)
            return None
        if method == "logits":
            return result + 1e-2
        changed = {"sigma": [s + 1e-2 for s in result.sigma]} if method == "sigma" else {}
        return replace(result, **(changed or {"probes": [slots + 1 for slots in result.probes]}))

    monkeypatch.setattr(OnnxRuntimeRunner, hook, wrong)
    rows = []
    with refused(ParityError, part, "onnxruntime", "build it again", str(golden_bundle)):
        for row in verify(Bundle.open(golden_bundle), "onnxruntime", 5e-4):
            rows.append(row)
    assert len(rows) == 8 + len(DRIFT_PARTS), "the table is complete all the same"
    bad = {row.part for row in rows if not row.max <= 5e-4}
    assert bad == {"sigma": set(DRIFT_PARTS), "logits": {"head", "forward"}}.get(method, {part})


def test_verify_of_not_a_number(golden_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = OnnxRuntimeModel.forward
    monkeypatch.setattr(OnnxRuntimeModel, "forward", lambda self, ids: real(self, ids) * math.nan)
    with refused(ParityError, "forward", "nan", "build it again"):
        list(verify(Bundle.open(golden_bundle), "onnxruntime", 5e-4))


def test_verify_refuses(golden_bundle: Path) -> None:
    bundle = Bundle.open(golden_bundle)
    for atol in (0.0, -1.0, math.nan):
        with refused(OptionError, "atol must be positive", str(atol)):
            list(verify(bundle, "onnxruntime", atol))
    with refused(OptionError, "eager is the reference", "another"):
        list(verify(bundle, "eager", 1e-3))


# The contract of a walk


def test_walks_are_complete() -> None:
    """Every back end's walk fills in all hooks: those of its own way through the layers."""
    from engines.eager.model import EagerRunner

    assert {"permute", "embed", "layer", "run_layers", "reuse", "head", "logits"} <= SequenceRunner.__abstractmethods__
    assert {"save_previous", "drift", "probe"} <= LayerwiseRunner.__abstractmethods__
    for cls, hooks in (
        (EagerRunner, LayerwiseRunner.__abstractmethods__),
        (OnnxRuntimeRunner, SequenceRunner.__abstractmethods__),
    ):
        assert not cls.__abstractmethods__ and hooks <= set(vars(cls))


def test_short_sequences_have_room_for_all_rows(model: runtime.Runtime) -> None:
    """Fewer positions than the engines' rows: where slots are left, they are dummies."""
    runner = model.model.new_runner(5)
    assert runner.length == 5 and runner.slots == (
        model.bundle.capacity.rows if isinstance(runner, LayerwiseRunner) else 5
    )
    out = model.generate([7], gen_length=1)
    assert out.steps == 1 and len(out.sequence) == 2


def test_a_run_that_fails_is_one_sentence(golden: runtime.Runtime) -> None:
    """Rows that are not there: what ONNX Runtime says on bound values is translated as all else."""
    runner: Any = golden.model.new_runner(6)
    runner.embed(np.arange(6))
    with refused(BackendError, "ONNX Runtime failed on layer_00", "python -m export verify"):
        runner._run(3, 0, 1, tracked=np.array([5]), window=np.array([5]), wanted=np.arange(3))


def test_layers_in_one_graph(golden_bundle: Path) -> None:
    """One run of all layers leaves the same caches, drift numbers and tracked tokens as a run a layer."""
    length, rng = 90, np.random.default_rng(0)
    ids, changed = rng.integers(0, 250, (2, length))
    watch = DriftInputs("row", np.array([3, 20]), np.arange(4, 20), np.arange(length) % 3 > 0, np.arange(4, 20))
    found = []
    for together in (True, False):
        with runtime.load(golden_bundle, "onnxruntime", threads=1) as model:
            if not together:
                del cast(OnnxRuntimeModel, model.model).sessions["reuse"]
            runner = cast(OnnxRuntimeRunner, model.model.new_runner(length))
            runner.embed(ids)
            runner.run_layers(length, watch)
            runner.permute(np.array([0, 1, 50, 60]), np.array([50, 60, 0, 1]))
            runner.embed(changed[:24])
            outcome = runner.reuse(24, watch, 0.0)
            found.append(({"h": runner.h, "q": runner.q, "k": runner.k, "v": runner.v}, outcome))
            assert model.model.runs["reuse"] == together
    (ours, one), (theirs, other) = found
    for name, cache in ours.items():
        gap = np.abs(cache - theirs[name])
        print(f"{name}: max {gap.max():.2e} mean {gap.mean():.2e}")
        assert gap.max() < 1e-4
    print("sigma", np.abs(np.array(one.sigma) - other.sigma).max())
    assert np.allclose(one.sigma, other.sigma, atol=1e-6) and max(one.sigma) < 1, "drift is seen, not written over"
    assert np.array_equal(one.probes, other.probes)


def test_large_models_have_no_second_copy_of_their_weights(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with runtime.load(export.build(tiny_checkpoint, tmp_path / "few"), "onnxruntime", threads=1) as model:
        expected = model.generate([5, 6, 7], gen_length=24, gamma=0.99)
        assert model.model.runs["reuse"]
    monkeypatch.setattr("export.compilers.onnxruntime.FEW_BYTES", 0)
    bundle = export.build(tiny_checkpoint, tmp_path / "many")
    assert "reuse" not in Bundle.open(bundle).manifest.engines["onnxruntime"]["parts"]
    with runtime.load(bundle, "onnxruntime", threads=1) as model:
        out = model.generate([5, 6, 7], gen_length=24, gamma=0.99)
        assert out.sequence == expected.sequence and not model.model.runs["reuse"]


def test_what_leaves_the_last_layer_is_for_its_readers(model: runtime.Runtime) -> None:
    """Readers' predictions do not depend on whether other rows have any."""
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
    """A cycle of slots: each row arrives where it is sent, whatever was written before."""
    runner = model.model.new_runner(6)
    runner.embed(np.array([10, 11, 12, 13, 14, 15]))
    before = runner.hidden(0, 6)
    runner.permute(np.array([0, 1, 2, 4]), np.array([4, 0, 1, 2]))
    assert np.array_equal(runner.hidden(0, 6), before[[4, 0, 1, 3, 2, 5]])
    runner.permute(np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert np.array_equal(runner.hidden(0, 6), before[[4, 0, 1, 3, 2, 5]])


def test_load_is_the_only_way(golden_bundle: Path) -> None:
    """`load` takes a bundle that was opened, and gives the model of the back end that was asked for."""
    model = backends.load(Bundle.open(golden_bundle), "onnxruntime")
    assert isinstance(model, OnnxRuntimeModel) and model.capacity.window == 32
    model.close()
