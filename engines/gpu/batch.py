"""Several sequences on a GPU, whose reuse passes run as one, so that weights are read once for all of them.

A pass of B sequences runs the first B places. So that a batch does not compute
for sequences that are over, the places of those that go on are brought to the
front, as the slots of an active set are; places between them that are idle are
run along, and what that writes there nothing reads. Only a few B are used, for
each has a graph. Nothing here knows a back end, windows, gamma or text.
"""

import math
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from engines.gpu.cache import Caches
from engines.gpu.passes import PassQueue, control_buffer, result_buffer
from engines.gpu.runner import GpuRunner
from engines.runner import ReusePass, ReuseResult
from engines.weights import SIZES

if TYPE_CHECKING:
    from engines.gpu.model import GpuModel


def size_of(count: int, batch_rows: int) -> int:
    """How many of `places` places a pass of `count` sequences runs: 2, 3, 4, 6, 8, 12, 16, …, or all."""
    sizes = (size for power in range(1, 64) for size in (1 << power, 3 << power - 1))
    return min(batch_rows, next(size for size in sizes if size >= count))


def runner_of(due: ReusePass) -> GpuRunner:
    assert isinstance(due.runner, GpuRunner)
    return due.runner


class Batch:
    """The walks at `places` places, which share one allocation of each cache."""

    def __init__(self, model: "GpuModel", slots: int, batch_rows: int):
        config, capacity = model.config, model.capacity
        self.cuda, self.rows, known = model.cuda, capacity.rows, len(model.cuda.owned)
        self.layers, self.tracked, self.window = config.layers, capacity.track_num, capacity.window
        element = SIZES[model.bundle.manifest.precision]
        self.caches = Caches(self.cuda, config, capacity, element, slots, batch_rows)
        self.runners = [GpuRunner(model, self.caches, batch_row) for batch_row in range(batch_rows)]
        rows = dict.fromkeys(("ids", "positions", "tracked", "window"), capacity.rows)
        self.widths = rows | {"key_mask": slots, "probe_keys": slots, "rows": capacity.window, "write_index": 1}
        self.control = control_buffer(self.cuda, batch_rows, self.widths)
        self.result = result_buffer(self.cuda, batch_rows, config.layers, capacity.track_num, capacity.window)
        self.parts = PassQueue(model, self.caches, self.control, self.result)
        self.owned = self.cuda.owned[known:]

    def start(self, lengths: list[int]) -> list[GpuRunner]:
        """Begin sequences of these lengths; those that were under way are over."""
        for runner in self.runners:
            runner.end()
        chosen = self.runners[: len(lengths)]
        for runner, length in zip(chosen, lengths, strict=True):
            runner.start(length)
        return chosen

    def joins(self, passes: list[ReusePass]) -> bool:
        """Whether passes can run as one: captured ones with one drift test, none with given embeddings, and all
        sequences under way take part."""
        going = {id(runner) for runner in self.runners if not runner.idle}
        return (
            {id(due.runner) for due in passes} == going
            and len({due.watch.kind for due in passes}) == 1
            and all(runner_of(due).captured(due) and runner_of(due).given is None for due in passes)
        )

    def reuse(self, passes: list[ReusePass]) -> list[ReuseResult]:
        """Run passes that join: one upload, one launch and one wait for all of them."""
        kind, count = passes[0].watch.kind, size_of(len(passes), len(self.runners))
        self._close_up(count)
        for due in passes:
            runner_of(due).set_targets(due.watch)
        self._gather(count)
        self.parts.batch = count
        self.parts.replay((kind, count), lambda: self.parts.reuse(self.rows, kind, self.rows))
        self.result.fetch()
        sigma = self._result("sigma", self.layers, count)
        probe = self._result("probe", self.layers, count, self.tracked)
        token, confidence = (self._result(name, count, self.window) for name in ("token", "confidence"))
        batch_rows = [runner_of(due).batch_row for due in passes]
        return [
            runner_of(due).record(
                due, sigma[:, batch_row], probe[:, batch_row], token[batch_row], confidence[batch_row]
            )
            for due, batch_row in zip(passes, batch_rows, strict=True)
        ]

    def _close_up(self, count: int) -> None:
        """Have all sequences under way at the first `count` places."""
        free = [batch_row for batch_row, runner in enumerate(self.runners[:count]) if runner.idle]
        for batch_row in range(count, len(self.runners)):
            if not self.runners[batch_row].idle:
                self._exchange(free.pop(0), batch_row)

    def _exchange(self, target: int, source: int) -> None:
        """Move a sequence to a place that is idle; the idle walk gets the place it leaves."""
        runner, idle = self.runners[source], self.runners[target]
        runner.relocate(target)
        idle.batch_row = source
        self.runners[target], self.runners[source] = runner, idle

    def _gather(self, count: int) -> None:
        """Send what the walks at the first places are to be told."""
        self.control.edit()
        for name, width in self.widths.items():
            told = self.control[name][: count * width].reshape(count, width)
            for batch_row, runner in enumerate(self.runners[:count]):
                told[batch_row] = runner.control[name][:width]
        self.control.send()

    def _result(self, name: str, *shape: int) -> NDArray[Any]:
        """What a pass said: results of fewer sequences than there are places take the first part of an array."""
        return self.result[name][: math.prod(shape)].reshape(shape)

    def release(self) -> None:
        """Give the memory and the graphs back; walks and passes cannot be used any more."""
        self.cuda.sync()
        for runner in self.runners:
            runner.end()
        for parts in (self.parts, *(runner.parts for runner in self.runners)):
            parts.release()
        for address in self.owned:
            self.cuda.free(address)
