"""A model whose parts run on a GPU: what its back ends share.

It hands out walks on memory that serves one batch of sequences after the other,
and runs their reuse passes as one where it can. How an engine is run the back
ends know. Nothing here knows windows, gamma or text.
"""

from engines.errors import BackendError
from engines.gpu.batch import Batch, runner_of
from engines.gpu.cuda import Cuda
from engines.gpu.passes import Bindings, Engine
from engines.gpu.runner import GpuRunner
from engines.model import Model
from engines.runner import ReusePass, ReuseResult


class GpuModel(Model):
    """A model whose parts run on a GPU. `weights` are ports of the parts' engines, if they are not in them."""

    cuda: Cuda
    weights: dict[str, Bindings]
    capturable: bool  # whether what an engine queues may be captured as a graph
    batches: dict[int, Batch]  # by slots

    def engine(self, part: str, slots: int) -> Engine:
        """The engine of `part` for walks of `slots` slots."""
        raise NotImplementedError

    def slots_for_length(self, length: int) -> int:
        """Slots of a walk that has room for `length` positions and a reuse pass's dummies."""
        raise NotImplementedError

    def new_runners(self, spans: list[tuple[int, int]]) -> list[GpuRunner]:
        """Walks with as many slots each, those of the longest: one engine runs them all, and whole passes of short
        sequences cost what the longest one's do."""
        slots = self.slots_for_length(max(limit for _, limit in spans))
        if slots in self.batches and len(self.batches[slots].runners) < len(spans):
            self.batches.pop(slots).release()
        if slots not in self.batches:
            self.batches[slots] = self._take(slots, len(spans))
        return self.batches[slots].start([length for length, _ in spans])

    def _take(self, slots: int, batch_rows: int) -> Batch:
        """Memory for a batch; where it does not fit, that of other lengths, which serves nobody now, is given back."""
        known = len(self.cuda.owned)
        try:
            return Batch(self, slots, batch_rows)
        except BackendError:
            self.cuda.sync()
            for address in self.cuda.owned[known:]:
                self.cuda.free(address)
            if not self.batches:
                raise
        while self.batches:
            self.batches.popitem()[1].release()
        return self._take(slots, batch_rows)

    def reuse(self, passes: list[ReusePass]) -> list[ReuseResult]:
        """As one pass where they join. Otherwise, where engines cannot be captured or rows differ, one after the
        other, with one wait at the end."""
        if len(passes) < 2 or not all(runner_of(due).ahead(due) for due in passes):
            return super().reuse(passes)
        batch = self.batches[passes[0].runner.slots]
        if batch.joins(passes):
            return batch.reuse(passes)
        for due in passes:
            runner_of(due).queue(due)
        self.cuda.sync()
        return [runner_of(due).collect(due) for due in passes]

    def close(self) -> None:
        if not self.closed:
            self.batches.clear()
            self.cuda.close()
        super().close()
