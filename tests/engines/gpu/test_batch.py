"""Reuse passes of several sequences as one, on stand-ins: the decisions each has alone, for one launch and one wait."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import export
import runtime
from engines.errors import BackendError
from engines.gpu.batch import Batch, pass_size
from engines.gpu.cuda import Cuda
from engines.gpu.model import GpuModel
from engines.runner import DriftInputs, ReusePass, ReuseResult
from engines.signatures.gpu import DRIFTS
from runtime.decoding.controller import StepEvent
from runtime.decoding.generate import Output, stream_batch
from runtime.decoding.policies import make_policy
from runtime.decoding.request import Request
from scripts.gpu_check import batch_figures
from tests.runtime.decoding.test_batch import near
from tests.support.cases import DATA, GOLDEN, refused
from tests.support.comparison import difference, recorded
from tests.support.fake_gpu import FakeCuda, fake_gpu, fake_provider

DREAM = DATA / "dream-tiny"
RAGGED: list[list[int]] = [[3, 1, 4], [7] * 20, [9, 8], list(range(30)), [5], [2, 71, 8, 2, 8]]
SHAPE: dict[str, Any] = {"window": 8, "track_num": 2, "max_length": 96, "max_batch": 8}
options = st.fixed_dictionaries(
    {
        "gen_length": st.integers(1, 24), "window": st.integers(1, 8), "threshold": st.floats(0.05, 1.0),
        "gamma": st.floats(0.5, 0.999), "drift": st.sampled_from(DRIFTS), "track_num": st.integers(1, 2),
        "block_caching": st.booleans(), "refresh_scope": st.sampled_from(("all", "near")),
        "eos_id": st.sampled_from((250, 30, 12)), "max_masks": st.sampled_from((None, 16)),
        "window_span": st.sampled_from((None, 4)),
    }
)  # fmt: skip
prompts = st.lists(st.lists(st.integers(0, 249), min_size=1, max_size=40), min_size=2, max_size=6)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint in fp32, compiled by the stand-in for 8 sequences. Read only."""
    with fake_gpu():
        return export.build(GOLDEN, tmp_path_factory.mktemp("batch") / "bundle", backends=["all"], **SHAPE)


@pytest.fixture(scope="module")
def dream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family whose rows predict the next position, with fewer key heads than heads. Read only."""
    with fake_gpu():
        return export.build(DREAM, tmp_path_factory.mktemp("dream") / "bundle", backends=["all"], **SHAPE)


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[Path, str], runtime.Runtime]]:
    """Loads a bundle on a stand-in's back end; closed at the end."""
    with ExitStack() as stack:
        found: dict[tuple[Path, str], runtime.Runtime] = {}

        def loaded(bundle: Path, backend: str) -> runtime.Runtime:
            if (bundle, backend) not in found:
                with fake_gpu() if backend == "tensorrt" else fake_provider():
                    found[bundle, backend] = stack.enter_context(runtime.load(bundle, backend))
            return found[bundle, backend]

        yield loaded


@pytest.fixture(scope="module")
def model(bundle: Path, load: Callable[[Path, str], runtime.Runtime]) -> runtime.Runtime:
    return load(bundle, "tensorrt")


@pytest.fixture(scope="module", params=["tensorrt", "onnxruntime"])
def either(request: Any, bundle: Path, load: Callable[[Path, str], runtime.Runtime]) -> runtime.Runtime:
    return load(bundle, request.param)


def device(model: runtime.Runtime) -> tuple[GpuModel, FakeCuda]:
    assert isinstance(model.model, GpuModel) and isinstance(model.model.cuda, FakeCuda)
    return model.model, model.model.cuda


def batch_of(model: runtime.Runtime) -> Batch:
    (batch,) = device(model)[0].batches.values()
    return batch


def same(out: Output, alone: Output) -> None:
    assert difference(recorded(out), recorded(alone)) is None
    for name in ("window", "tokens", "rows", "trigger"):
        assert [getattr(e, name) for e in out.trace] == [getattr(e, name) for e in alone.trace], name
    gaps = [abs(a - b) for x, y in zip(out.trace, alone.trace, strict=True)
            for a, b in zip(x.sigma, y.sigma, strict=True)]  # fmt: skip
    assert max(gaps, default=0.0) < 1e-5


# What each sequence decides


@settings(max_examples=40)
@given(prompts, options)
@example([[1], [2, 3], [4] * 9], {"gen_length": 16, "window": 4, "gamma": 0.9, "block_caching": False})
@example(RAGGED, {"gen_length": 16, "window": 4, "gamma": 0.995, "max_masks": 8, "threshold": 0.3})
def test_ragged_batches(either: runtime.Runtime, prompts: list[list[int]], options: dict[str, Any]) -> None:
    """40 of them on each stand-in: tokens, triggers, commits and tracked tokens of every sequence as alone."""
    outs = either.generate_batch(prompts, **options)
    for prompt, out in zip(prompts, outs, strict=True):
        alone = either.generate(prompt, **options)
        if not near(alone, options["gamma"]):
            same(out, alone)


@pytest.mark.parametrize("kind", DRIFTS)
def test_every_drift_test(either: runtime.Runtime, kind: str) -> None:
    """With refreshes in between: each sequence's own."""
    given_: dict[str, Any] = {"gen_length": 24, "window": 4, "gamma": 0.985, "drift": kind, "stop_at_eos": False}
    outs = either.generate_batch(RAGGED, **given_)
    alone = [either.generate(prompt, **given_) for prompt in RAGGED]
    for ours, theirs in zip(outs, alone, strict=True):
        if not near(theirs, 0.985):
            same(ours, theirs)
    print(kind, [[e.trigger for e in out.trace[1:9]] for out in outs])


@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime"])
def test_rows_that_predict_the_next_position(
    dream: Path, backend: str, load: Callable[[Path, str], runtime.Runtime]
) -> None:
    model = load(dream, backend)
    given_: dict[str, Any] = {"gen_length": 20, "window": 4, "gamma": 0.97, "stop_at_eos": False}
    for ours, prompt in zip(model.generate_batch(RAGGED, **given_), RAGGED, strict=True):
        alone = model.generate(prompt, **given_)
        if not near(alone, 0.97):
            same(ours, alone)


def test_given_embeddings(either: runtime.Runtime) -> None:
    """Rows of the table in place of their ids: the same runs, alone and side by side, and the memory comes back."""
    table = load_file(next(either.bundle.root.glob("onnx/embed*.safetensors")))["wte.weight"]
    ids = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8])
    swapped = ids.copy()
    swapped[[1, 4, 5, 6, 9]] = 256 + np.array([0, 1, 2, 3, 4])
    for policy in ("elastic", "full", "prefix"):
        more: dict[str, Any] = {"gamma": 0.97, "window": 4} if policy == "elastic" else {}
        plain = either.generate(ids, policy, gen_length=24, **more)
        given_ = either.generate(swapped, policy, gen_length=24, embeddings=table[ids[[1, 4, 5, 6, 9]]], **more)
        assert given_.sequence[12:] == plain.sequence[12:]
        assert [event.tracked for event in given_.trace] == [event.tracked for event in plain.trace]
    outs = either.generate_batch([swapped, swapped], gen_length=24, embeddings=table[ids[[1, 4, 5, 6, 9]]], window=4)
    alone = either.generate(ids, gen_length=24, window=4)
    assert all(out.sequence[12:] == alone.sequence[12:] for out in outs)
    owned = len(FakeCuda.latest.owned)
    either.generate(swapped, gen_length=8, embeddings=table[ids[[1, 4, 5, 6, 9]]], window=4)
    either.generate(ids, gen_length=8, window=4)
    assert len(FakeCuda.latest.owned) <= owned


def test_draws_and_policies_without_a_drift_test(either: runtime.Runtime) -> None:
    drawn: dict[str, Any] = {"temperature": 0.8, "seed": 3, "window": 4}
    ways: dict[str, dict[str, Any]] = {"elastic": drawn, "prefix": {}, "dual": {}}
    for policy, given_ in ways.items():
        outs = either.generate_batch(RAGGED[:3], policy, gen_length=16, **given_)
        alone = [either.generate(prompt, policy, gen_length=16, **given_) for prompt in RAGGED[:3]]
        assert [out.sequence for out in outs] == [out.sequence for out in alone]


def test_caches_are_those_of_sequences_alone(model: runtime.Runtime) -> None:
    """What passes leave behind counts, not their tokens only."""
    given_: dict[str, Any] = {"gen_length": 12, "window": 4, "gamma": 0.5, "stop_at_eos": False, "tokens_per_step": 2}
    model.generate_batch(RAGGED, **given_)
    batched = [caches(model, batch_row) for batch_row in range(6)]
    for prompt, ours in zip(RAGGED, batched, strict=True):
        model.generate(prompt, **given_)
        gaps = [float(np.abs(a - b).max()) for a, b in zip(ours, caches(model, 0), strict=True)]
        print("H, Q, K, V differ by", *(f"{gap:.0e}" for gap in gaps))
        assert max(gaps) < 1e-5


def caches(model: runtime.Runtime, batch_row: int) -> list[Any]:
    """H, Q, K and V [L, planes, slots, width] of a sequence, its positions in order; dummies hold what they may."""
    batch, (_, cuda) = batch_of(model), device(model)
    runner, c = batch.runners[batch_row], batch.caches
    real = np.flatnonzero(runner.control["key_mask"])
    order = real[np.argsort(runner.control["positions"][real])]
    found = []
    for n in "hqkv":
        layers = [cuda.at(c.at(n, index, batch_row), c.size(n)).view(np.float32) for index in range(c.layers[n])]
        found.append(np.stack([x.reshape(c.planes[n], c.slots, -1)[:, order] for x in layers]))
    return found


# What it costs


def counts(model: runtime.Runtime, requests: list[Request], **policy: Any) -> Any:
    """Waits, launches, uploads, downloads and engine runs of each step of a batch."""
    _, cuda = device(model)
    seen, last = [], -1
    for _, event in stream_batch(model.model, requests, make_policy("elastic", policy), None):
        if isinstance(event, StepEvent) and event.step > last:
            last = event.step
            seen.append([cuda.waits, *(cuda.counts[kind] for kind in ("launch", "upload", "download", "run"))])
    return np.diff(np.array(seen), axis=0)


def test_one_launch_and_one_wait_for_all(model: runtime.Runtime) -> None:
    """Nothing drifts at gamma 0. The runs too are those of one sequence: weights are read once for all."""
    requests = [Request(prompt, 24, stop_at_eos=False) for prompt in RAGGED]
    steps = counts(model, requests, gamma=0.0, window=4, tokens_per_step=1, threshold=None)[2:-1]
    assert len(steps) > 10 and (steps[:, :4] == 1).all(), steps
    parts = 3 * model.model.config.layers + 2
    assert (steps[:, 4] == 0).all() and len(batch_of(model).pass_queue.graphs["row", 6]) > parts, "all in the graph"


def test_one_wait_where_engines_cannot_be_captured(bundle: Path, load: Callable[[Path, str], runtime.Runtime]) -> None:
    model = load(bundle, "onnxruntime")
    requests = [Request(prompt, 24, stop_at_eos=False) for prompt in RAGGED]
    steps = counts(model, requests, gamma=0.0, window=4, tokens_per_step=1, threshold=None)[2:-1]
    assert len(steps) > 10 and (steps[:, :4] == [1, 0, 6, 6]).all(), steps


def test_one_wait_where_rows_differ(model: runtime.Runtime) -> None:
    """Without block caching the masks ahead are active too: more rows than are captured, until few are left."""
    requests = [Request(prompt, length, stop_at_eos=False) for prompt, length in zip(RAGGED, (40, 8, 40, 20, 30, 40),
                                                                                    strict=True)]  # fmt: skip
    for _ in range(2):  # engines are readied for new sizes on the way, which waits too
        steps = counts(model, requests, gamma=0.0, window=4, tokens_per_step=1, threshold=None, block_caching=False)
    assert (steps[1:, 0] == 1).all() and (steps[1, 1:4] > 1).all() and (steps[-2, 1:4] == 1).all(), steps


def test_sizes_of_a_pass() -> None:
    for batch_rows in range(1, 33):
        sizes = [pass_size(count, batch_rows) for count in range(1, batch_rows + 1)]
        assert sizes == sorted(sizes) and len(set(sizes)) <= 10 and sizes[-1] == batch_rows
        assert all(count <= size <= max(2, count * 3 / 2) for count, size in enumerate(sizes, 1) if batch_rows > 1)


def test_the_figures_of_a_gpu_check(model: runtime.Runtime) -> None:
    """What is measured on a GPU, run on the stand-in: every size, equal tokens, and a size that does not fit."""
    found = batch_figures(model, (1, 2, 4), 80, 4, 6)
    print(found)
    for size in ("1", "2", "4"):
        assert found[size]["reuse_ms"] > 0
        for case in found[size]["decoding"]:
            assert case["equal_to_alone"] == 4 == case["sequences"] and case["tokens_per_second"] > 0
    assert batch_figures(model, (9,), 80, 4, 6)["9"].startswith("TensorRT refuses ids (9, ")


# Sequences that are over, and those that wait


def test_sequences_that_end_early(model: runtime.Runtime) -> None:
    """They are not computed any more: those that go on close up, and passes get smaller until one is left."""
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
        same(outs[number], model.generate(prompt, gen_length=length, gamma=0.9, window=4, tokens_per_step=1,
                                          stop_at_eos=False))  # fmt: skip


def test_what_idle_places_hold_reaches_nobody(model: runtime.Runtime) -> None:
    """A pass of 5 runs 6 places: the sixth's caches are filled with NaN."""
    given_: dict[str, Any] = {"gen_length": 16, "window": 4, "gamma": 0.95}
    model.generate_batch(RAGGED, **given_)
    expected = model.generate_batch(RAGGED[:5], **given_)
    poison(model, 5)
    for ours, theirs in zip(model.generate_batch(RAGGED[:5], **given_), expected, strict=True):
        same(ours, theirs)
    assert batch_of(model).pass_queue.graphs["row", 6] is not None
    poison(model, 5)
    for ours, prompt in zip(model.generate_batch(RAGGED, **given_), RAGGED, strict=True):
        same(ours, model.generate(prompt, **given_))


def poison(model: runtime.Runtime, batch_row: int) -> None:
    caches, (_, cuda) = batch_of(model).caches, device(model)
    for n in "hqkv":
        for index in range(caches.layers[n]):
            cuda.at(caches.at(n, index, batch_row), caches.size(n)).view(np.float32)[:] = np.nan


def test_a_batch_that_was_broken_off(model: runtime.Runtime) -> None:
    """Its sequences are over when the next batch begins: that one runs as one pass, with none of them on board."""
    events = model.stream_batch(RAGGED, gen_length=24, window=4)
    for _ in range(20):
        next(events)
    events.close()  # type: ignore[attr-defined]
    requests = [Request(prompt, 12, stop_at_eos=False) for prompt in RAGGED[:3]]
    steps = counts(model, requests, gamma=0.0, window=4, tokens_per_step=1, threshold=None)[2:-1]
    assert (steps[:, :4] == 1).all() and batch_of(model).pass_queue.batch == 3, steps


def passes_of(model: runtime.Runtime, count: int) -> list[ReusePass]:
    """Sequences side by side after a whole pass each, and a reuse pass that is due in each."""
    made, _ = device(model)
    due = []
    for number, runner in enumerate(made.new_runners([(40, 40)] * count)):
        runner.embed(np.arange(runner.slots) % 200 + number)
        window, eligible = np.arange(4, 12), np.arange(runner.slots) < 40
        runner.run_layers(runner.slots, DriftInputs("row", np.arange(2), window, eligible, window))
        runner.embed(np.arange(runner.padded_rows) % 200 + number + 1)
        due.append(
            ReusePass(runner, runner.padded_rows, DriftInputs("row", np.arange(2), window, eligible, window), 0.9)
        )
    return due


def test_a_sequence_that_waits_is_left_alone(model: runtime.Runtime) -> None:
    """It runs no pass in this step and is not over: the others run one after the other, and it keeps every byte."""
    made, cuda = device(model)
    due = passes_of(model, 4)
    cuda.sync()
    before = caches(model, 2)
    some = [due[0], due[1], due[3]]
    outcomes = made.reuse(some)
    assert all(np.array_equal(a, b) for a, b in zip(before, caches(model, 2), strict=True))
    alone = [due.runner.reuse(due.rows, due.watch, due.gamma) for due in passes_of(model, 4)]
    for number, ours in zip((0, 1, 3), outcomes, strict=True):
        equal(ours, alone[number])


def equal(ours: ReuseResult, theirs: ReuseResult) -> None:
    assert np.allclose(ours.sigma, theirs.sigma, atol=1e-5) and ours.trigger == theirs.trigger
    assert [p.tolist() for p in ours.probes] == [p.tolist() for p in theirs.probes]


def test_the_heads_words_are_each_sequences_own(model: runtime.Runtime) -> None:
    """After a batched pass no head is run again for rows it has read; for others it is."""
    made, cuda = device(model)
    due = passes_of(model, 3)
    made.reuse(due)
    runs = cuda.counts["run"] + cuda.counts["launch"]
    said = [each.runner.head(each.watch.logits_rows) for each in due]
    assert cuda.counts["run"] + cuda.counts["launch"] == runs
    for each, (token, confidence) in zip(due, said, strict=True):
        again, sure = each.runner.head(np.append(each.watch.logits_rows, 0))
        assert (again[:-1] == token).all() and np.allclose(sure[:-1], confidence, atol=1e-5)
    assert cuda.counts["run"] == runs - cuda.counts["launch"] + 3


# Memory


def test_memory_serves_one_batch_after_the_other(bundle: Path) -> None:
    """It grows with the largest batch, and gives back what it had; smaller batches use its first places."""
    with fake_gpu(), runtime.load(bundle, "tensorrt") as model:
        _, cuda = device(model)
        outs, held = [], []
        for count in (1, 4, 2, 4, 1):
            outs.append(model.generate_batch(RAGGED[:count], gen_length=12, gamma=0.9))
            held.append((len(cuda.owned), sum(region.size for region in cuda.regions.values())))
        assert held[1][1] > held[0][1] and held[1] == held[3] == held[4]
        for a, b in ((0, 4), (1, 3)):
            for ours, theirs in zip(outs[a], outs[b], strict=True):
                same(ours, theirs)
    assert not cuda.owned and not cuda.regions


def test_a_batch_larger_than_the_memory(bundle: Path) -> None:
    """Says what does not fit, in one sentence; gives back what it took, and one sequence still runs."""
    with fake_gpu(), runtime.load(bundle, "tensorrt") as model:
        _, cuda = device(model)
        held = list(cuda.owned)
        expected = model.generate(RAGGED[0], gen_length=8)
        cuda.limit = sum(region.size for region in cuda.regions.values()) + 200_000
        with refused(BackendError, "out of GPU memory", "of 6 sequences"):
            model.generate_batch(RAGGED, gen_length=8)
        assert set(held) <= set(cuda.owned) and not device(model)[0].batches
        same(model.generate(RAGGED[0], gen_length=8), expected)


def test_memory_of_other_lengths_makes_room(golden_bundle: Path) -> None:
    """ONNX Runtime's sequences have memory by length: what serves nobody is given back before a batch is refused."""
    with fake_provider(), runtime.load(golden_bundle, "onnxruntime") as model:
        made, cuda = device(model)
        model.generate([1] * 300, gen_length=4)
        cuda.limit = sum(region.size for region in cuda.regions.values()) + 200_000
        assert len(made.batches) == 1 and model.generate_batch([[1], [2, 3]], gen_length=4)
        assert list(made.batches) == [256]


def test_more_sequences_than_the_engines_take(bundle: Path) -> None:
    """The stand-in looks at the batch axis too: 9 sequences lie in no profile."""
    with fake_gpu(), runtime.load(bundle, "tensorrt") as model, refused(BackendError, "refuses ids (9, ", "embed"):
        device(model)[0].reuse(passes_of(model, 9))


def test_a_failure_within_a_batch_gives_the_model_back(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(), runtime.load(bundle, "tensorrt") as model:
        expected = model.generate_batch(RAGGED, gen_length=8, gamma=0.9)
        with monkeypatch.context() as patch:
            patch.setattr(Batch, "reuse", lambda *_: (_ for _ in ()).throw(BackendError("it fails")))
            with refused(BackendError, "it fails"):
                model.generate_batch(RAGGED, gen_length=8)
        for ours, theirs in zip(model.generate_batch(RAGGED, gen_length=8, gamma=0.9), expected, strict=True):
            same(ours, theirs)
    assert not device(model)[1].owned


# CUDA's calls, and the stand-in's rules


def fake(**api: Any) -> Cuda:
    """CUDA without a GPU: calls are noted, not made."""
    cuda = object.__new__(Cuda)
    cuda.stream, cuda.owned, cuda.hosts = 7, [], set()
    cuda.api = SimpleNamespace(**api)
    return cuda


def test_a_copy_through_planes_says_what_the_stand_in_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """cudaMemcpy3DAsync finds byte x of row y of plane z at pointer + (z · ysize + y) · pitch + x."""
    runtime_api = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python; scripts/setup.sh installs it")
    cuda, seen = fake(**vars(runtime_api)), []
    monkeypatch.setattr(cuda, "call", lambda name, *arguments: seen.append((name, *arguments)))
    cuda.copy_planes(4096, 2, 3, 8193, 8, 6, 2, 3, 2)
    ((name, copy, stream),) = seen
    assert (name, stream) == ("cudaMemcpy3DAsync", 7)
    assert (int(copy.dstPtr.ptr), copy.dstPtr.pitch, copy.dstPtr.ysize) == (4096, 2, 3)
    assert (int(copy.srcPtr.ptr), copy.srcPtr.pitch, copy.srcPtr.ysize) == (8193, 8, 6)
    assert (copy.extent.width, copy.extent.height, copy.extent.depth) == (2, 3, 2)
    assert copy.kind == runtime_api.cudaMemcpyKind.cudaMemcpyDeviceToDevice


def test_what_does_not_fit_says_how_to_go_on() -> None:
    full = SimpleNamespace(cudaSuccess=0)
    cuda = fake(cudaMalloc=lambda size: (2, 0), cudaError_t=full, cudaMemGetInfo=lambda: (0, 10**9, 8 * 10**9))
    with refused(BackendError, "the cache of K of 16 sequences needs 2.50 GB", "1.00 of 8.00 GB", "fewer prompts"):
        cuda.alloc(2_500_000_000, "the cache of K of 16 sequences")
    assert not cuda.owned


def test_memory_of_either_kind_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, seen = fake(), []
    host = np.zeros(8, np.uint8)

    def call(name: str, *_: Any) -> int:
        seen.append(name)
        return host.ctypes.data

    monkeypatch.setattr(cuda, "call", call)
    cuda.owned.append(5)
    assert (cuda.pinned(8) == 0).all() and cuda.owned == [5, host.ctypes.data]
    monkeypatch.setattr(cuda, "sync", lambda: None)
    cuda.close()
    assert seen == ["cudaMallocHost", "cudaFreeHost", "cudaFree", "cudaStreamDestroy"] and not cuda.hosts


def test_the_stand_in_keeps_the_rules(bundle: Path) -> None:
    """What it would not notice it could not prove: shapes of a captured graph, copies through planes, freed graphs."""
    cuda = FakeCuda()
    cuda.owned.clear()
    a, b = cuda.alloc(4 * 3 * 8, "a"), cuda.alloc(2 * 3 * 2, "b")
    cuda.at(a, 96)[:] = np.arange(96)
    cuda.copy_planes(b, 2, 3, a + 1, 8, 6, 2, 3, 2)
    cuda.sync()
    assert cuda.at(b, 12).tolist() == [1, 2, 9, 10, 17, 18, 49, 50, 57, 58, 65, 66]
    with pytest.raises(AssertionError, match="overlap"):
        cuda.copy_planes(b, 2, 2, a, 8, 6, 2, 3, 2)
    graph = cuda.capture(lambda: cuda.copy(b, a, 4))
    cuda.destroy(graph)
    cuda.launch(graph)
    with pytest.raises(AssertionError, match="given back"):
        cuda.sync()
    with fake_gpu(), runtime.load(bundle, "tensorrt") as model:
        made, cuda = device(model)
        due = passes_of(model, 2)
        for _ in range(2):
            made.reuse(due)
        graph = batch_of(model).pass_queue.graphs["row", 2]
        context = made.engine("embed", due[0].runner.slots).context(0, 2)  # type: ignore[attr-defined]
        context.context.set_input_shape("ids", (1, due[0].rows))
        cuda.launch(graph)
        with pytest.raises(AssertionError, match="other shapes now"):
            cuda.sync()
        cuda.queue.clear()
