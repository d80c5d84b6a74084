"""Several sequences on a GPU whose reuse passes run as one, so that the weights are read once for all of them.

A pass of B sequences runs the first B batch rows. Unfinished sequences are moved to the first batch rows, so that
finished ones cost nothing. Only a few values of B are used, because each has its own captured graph; idle batch rows
that this adds are computed too, and nothing reads what they write.
"""

import math
from typing import Any

from numpy.typing import NDArray

from engines.gpu.cache import DeviceCaches
from engines.gpu.executor import Executor
from engines.gpu.passes import PassQueue
from engines.gpu.runner import GpuRunner
from engines.gpu.staging import ControlBuffer, ResultBuffer
from engines.runner import ReusePass, ReuseResult
from engines.weights import SIZES


def pass_size(count: int, batch: int) -> int:
    """Batch rows that a pass of `count` sequences runs: `count` rounded up to 2, 3, 4, 6, 8, 12, …, at most `batch`."""
    sizes = (size for power in range(1, 64) for size in (1 << power, 3 << power - 1))
    return min(batch, next(size for size in sizes if size >= count))


def runner_of(due: ReusePass) -> GpuRunner:
    """The runner of a pass on this back end."""
    assert isinstance(due.runner, GpuRunner)
    return due.runner


class Batch:
    """The runners of `batch` batch rows, which share one allocation of each cache."""

    def __init__(self, executor: Executor, slots: int, batch: int):
        config, capacity = executor.config, executor.capacity
        self.cuda, self.rows, known = executor.cuda, capacity.rows, len(executor.cuda.owned)
        self.layers, self.track_num, self.window = config.layers, capacity.track_num, capacity.window
        self.caches = DeviceCaches(self.cuda, config, capacity, SIZES[executor.precision], slots, batch)
        self.runners = [GpuRunner(executor, self.caches, batch_row) for batch_row in range(batch)]
        rows = dict.fromkeys(("ids", "positions", "tracked", "window"), capacity.rows)
        self.widths = rows | {"key_mask": slots, "probe_keys": slots, "rows": capacity.window, "write_index": 1}
        self.control = ControlBuffer(self.cuda, batch, self.widths, executor.precision)
        self.result = ResultBuffer(self.cuda, batch, config.layers, capacity.track_num, capacity.window)
        self.pass_queue = PassQueue(executor, self.caches, self.control, self.result)
        self.owned = self.cuda.owned[known:]

    def start(self, lengths: list[int]) -> list[GpuRunner]:
        """Begin sequences of these lengths on the first batch rows; those of the batch before are over."""
        for runner in self.runners:
            runner.end()
        chosen = self.runners[: len(lengths)]
        for runner, length in zip(chosen, lengths, strict=True):
            runner.start(length)
        return chosen

    def can_join(self, passes: list[ReusePass]) -> bool:
        """Whether passes can run as one.

        All of them have the captured shape and one kind of drift test, none has input embeddings, and every
        sequence that is not over takes part.
        """
        running = {id(runner) for runner in self.runners if not runner.idle}
        return (
            {id(due.runner) for due in passes} == running
            and len({due.drift_inputs.kind for due in passes}) == 1
            and all(runner_of(due).has_captured_shape(due) for due in passes)
            and all(runner_of(due).input_embeddings is None for due in passes)
        )

    def reuse(self, passes: list[ReusePass]) -> list[ReuseResult]:
        """Run passes that can join: one upload, one launch and one wait for all of them."""
        kind, count = passes[0].drift_inputs.kind, pass_size(len(passes), len(self.runners))
        self._move_to_front(count)
        for due in passes:
            runner_of(due).set_targets(due.drift_inputs)
        self._upload_control(count)
        self.pass_queue.batch = count
        self.pass_queue.replay((kind, count), lambda: self.pass_queue.reuse(self.rows, kind))
        self.result.fetch()
        sigma = self.result["sigma"][:, :count]
        probe = self.result["probe"][:, : count * self.track_num].reshape(self.layers, count, -1)
        token, confidence = (self._result(name, count, self.window) for name in ("token", "confidence"))
        results = []
        for due in passes:
            runner = runner_of(due)
            row = runner.batch_row
            results.append(runner.record(due, sigma[:, row], probe[:, row], token[row], confidence[row]))
        return results

    def _move_to_front(self, count: int) -> None:
        """Move the sequences that are not over to the first `count` batch rows."""
        free = [batch_row for batch_row, runner in enumerate(self.runners[:count]) if runner.idle]
        for batch_row in range(count, len(self.runners)):
            if not self.runners[batch_row].idle:
                self._exchange(free.pop(0), batch_row)

    def _exchange(self, target: int, source: int) -> None:
        """Move a sequence to the idle batch row `target`; the idle runner takes the batch row that it leaves."""
        runner, idle = self.runners[source], self.runners[target]
        runner.relocate(target)
        idle.batch_row = source
        self.runners[target], self.runners[source] = runner, idle

    def _upload_control(self, count: int) -> None:
        """Copy the control arrays of the first `count` runners side by side and queue their upload."""
        self.control.edit()
        for name, width in self.widths.items():
            rows = self.control[name][: count * width].reshape(count, width)
            for batch_row, runner in enumerate(self.runners[:count]):
                rows[batch_row] = runner.control[name][:width]
        self.control.upload()

    def _result(self, name: str, *shape: int) -> NDArray[Any]:
        """A result of a pass; a pass of fewer sequences than batch rows fills the first part of the array."""
        return self.result[name][: math.prod(shape)].reshape(shape)

    def release(self) -> None:
        """Free the memory and the captured graphs; the runners cannot be used any more."""
        self.cuda.sync()
        for runner in self.runners:
            runner.end()
        for queue in (self.pass_queue, *(runner.pass_queue for runner in self.runners)):
            queue.release()
        for address in self.owned:
            self.cuda.free(address)
