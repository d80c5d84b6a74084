"""Queues of passes: when a graph is captured, and the profile and memory that a part runs with."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from engines.bundle import Bundle
from engines.config import Capacity, ModelConfig
from engines.gpu.cache import DeviceCaches
from engines.gpu.cuda import Cuda
from engines.gpu.executor import ANY, FULL, GENERAL, REUSE, Bindings
from engines.gpu.passes import PassQueue
from engines.gpu.staging import CONTROL, ControlBuffer, ResultBuffer
from tests.support.fake_gpu import FakeCuda

SLOTS = 60


@dataclass
class Recorder:
    """An executor whose engines record how they are run."""

    config: ModelConfig
    capacity: Capacity
    capturable: bool = True
    precision: str = "fp32"
    cuda: Cuda = field(default_factory=FakeCuda)
    weights: dict[str, Bindings] = field(default_factory=dict)
    runs: list[tuple[str, int, Bindings]] = field(default_factory=list)

    def engine(self, part: str, slots: int) -> "RecordedEngine":
        assert slots == SLOTS
        return RecordedEngine(self, part)


@dataclass
class RecordedEngine:
    executor: Recorder
    part: str

    def run(self, profile: int, bindings: Bindings, place: Hashable = None) -> None:
        self.executor.runs.append((self.part, profile, bindings))
        fake(self.executor).push(lambda: None, "run")


def fake(executor: Recorder) -> FakeCuda:
    assert isinstance(executor.cuda, FakeCuda)
    return executor.cuda


def queue_of(bundle: Path, batch: int = 1, capturable: bool = True) -> tuple[Recorder, PassQueue]:
    opened = Bundle.open(bundle)
    executor = Recorder(opened.config, opened.capacity, capturable, weights={"embed": {"table": (1, (2, 3))}})
    config, capacity, cuda = opened.config, opened.capacity, executor.cuda
    caches = DeviceCaches(cuda, config, capacity, 4, SLOTS, batch)
    control = ControlBuffer(cuda, batch, dict.fromkeys(CONTROL, SLOTS), "fp32")
    result = ResultBuffer(cuda, batch, config.layers, capacity.track_num, capacity.rows)
    queue = PassQueue(executor, caches, control, result)
    queue.batch = batch
    return executor, queue


@pytest.mark.parametrize("capturable", [True, False])
def test_the_second_run_is_captured(bundle: Path, capturable: bool) -> None:
    """The first one warms the engines up; without capture, all run as they are queued."""
    executor, queue = queue_of(bundle, capturable=capturable)
    counts = fake(executor).counts
    for launches in (0, 1, 2):
        queue.replay("key", lambda: queue.embed(4))
        assert counts["launch"] == (launches if capturable else 0)
    assert counts["capture"] == capturable
    queue.replay("other", lambda: queue.embed(5))
    assert counts["capture"] == capturable and counts["launch"] == (2 if capturable else 0)
    fake(executor).queue.clear()
    queue.release()
    assert not queue.graphs


def test_profiles(bundle: Path) -> None:
    executor, queue = queue_of(bundle)
    rows, window = executor.capacity.rows, executor.capacity.window
    for count, profile in ((rows, REUSE), (SLOTS, FULL), (3, GENERAL)):
        queue.layer(1, count)
        assert executor.runs.pop()[:2] == ("layer_01", profile)
    for count, profile in ((rows, REUSE), (SLOTS, ANY), (3, ANY)):
        queue.probe(0)
        queue.tests(0, count, "row")
        assert [run[:2] for run in executor.runs] == [("probe", REUSE), ("tests_row", profile)]
        executor.runs.clear()
    for count, profile in ((window, REUSE), (rows, ANY)):
        queue.head(count)
        assert executor.runs.pop()[:2] == ("head", profile)


def test_the_order_of_a_reuse_pass(bundle: Path) -> None:
    executor, queue = queue_of(bundle)
    rows, layers = executor.capacity.rows, executor.config.layers
    queue.reuse(rows, "head")
    expected = [name for index in range(layers) for name in (f"layer_{index:02d}", "tests_head")]
    assert [run[0] for run in executor.runs] == ["embed", *expected, "head"]
    assert executor.runs[0][2]["table"] == (1, (2, 3)), "weights are bound with the other inputs"


def test_one_sequence_runs_in_its_caches(bundle: Path) -> None:
    """No staging: a layer reads and writes H and Q where they are kept."""
    executor, queue = queue_of(bundle)
    queue.layer(1, 4)
    (_, _, bindings), caches = executor.runs[0], queue.caches
    assert [bindings[name][0] for name in ("hidden", "hidden_out", "q")] == [
        caches.at("h", 1, 0), caches.at("h", 2, 0), caches.at("q", 1, 0)
    ]  # fmt: skip
    assert bindings["k_cache"] == bindings["k_cache_out"] == (
        caches.at("k", 1, 0), (1, executor.config.kv_heads, SLOTS, executor.config.head_size)
    )  # fmt: skip


def test_rows_of_several_sequences_are_staged(bundle: Path) -> None:
    """What a layer leaves in the staging buffers is copied to each sequence's rows."""
    executor, queue = queue_of(bundle, batch=3)
    cuda, caches, width = fake(executor), queue.caches, queue.caches.width["h"]
    queue.layer(1, 4)
    (_, _, bindings) = executor.runs[0]
    source, target = bindings["hidden"], bindings["hidden_out"]
    assert source[1] == target[1] == (3, 4, executor.config.d_model) and source[0] != target[0]
    staged = cuda.at(target[0], 3 * 4 * width)
    staged[:] = np.arange(staged.size) % 251
    cuda.sync()
    for row in range(3):
        kept = cuda.at(caches.at("h", 2, row), 4 * width)
        assert np.array_equal(kept, staged[row * 4 * width : (row + 1) * 4 * width])
