"""A model whose parts run on a GPU: memory for batches of sequences, and their reuse passes as one.

How an engine is loaded and run is in the back ends, `engines.trt.model` and `engines.ort.gpu`.
"""

from abc import abstractmethod

from engines.bundle import Bundle
from engines.errors import BackendError
from engines.gpu.batch import Batch, runner_of
from engines.gpu.cuda import Cuda
from engines.gpu.executor import Bindings, Engine
from engines.gpu.runner import GpuRunner
from engines.model import Model
from engines.runner import ReusePass, ReuseResult


class GpuModel(Model):
    """A model whose parts run on one GPU and one stream; the `Executor` of its passes.

    One batch of sequences is decoded at a time; its memory serves the next one.
    """

    cuda: Cuda
    weights: dict[str, Bindings]  # by part: weights that are inputs of its engine
    capturable: bool  # whether the work that an engine queues may be captured as a CUDA graph

    def __init__(self, bundle: Bundle):
        super().__init__(bundle)
        self.precision = bundle.manifest.precision
        self.batches: dict[int, Batch] = {}  # by slots of a sequence

    @abstractmethod
    def engine(self, part: str, slots: int) -> Engine:
        """The engine of `part` for sequences of `slots` slots."""

    @abstractmethod
    def slots_for_length(self, length: int) -> int:
        """Slots of a sequence of up to `length` positions, with the dummies of a reuse pass."""

    def new_runners(self, spans: list[tuple[int, int]]) -> list[GpuRunner]:
        """One runner per sequence, each with as many slots as the longest needs.

        One engine runs them all, so a full pass of a short sequence costs what the longest one's does.
        """
        slots = self.slots_for_length(max(limit for _, limit in spans))
        if slots in self.batches and len(self.batches[slots].runners) < len(spans):
            self.batches.pop(slots).release()
        if slots not in self.batches:
            self.batches[slots] = self._allocate(slots, len(spans))
        return self.batches[slots].start([length for length, _ in spans])

    def _allocate(self, slots: int, batch: int) -> Batch:
        """Memory for a batch; where it does not fit, the idle memory of batches of other lengths is freed first."""
        known = len(self.cuda.owned)
        try:
            return Batch(self, slots, batch)
        except BackendError:
            self.cuda.sync()
            for address in self.cuda.owned[known:]:
                self.cuda.free(address)
            if not self.batches:
                raise
        while self.batches:
            self.batches.popitem()[1].release()
        return self._allocate(slots, batch)

    def reuse(self, passes: list[ReusePass]) -> list[ReuseResult]:
        """Run the passes as one where they can join.

        Otherwise, where engines cannot be captured or numbers of rows differ, one after the other, with one wait at
        the end.
        """
        if len(passes) < 2 or not all(runner_of(due).can_run_ahead(due) for due in passes):
            return super().reuse(passes)
        batch = self.batches[passes[0].runner.slots]
        if batch.can_join(passes):
            return batch.reuse(passes)
        for due in passes:
            runner_of(due).enqueue(due)
        self.cuda.sync()
        return [runner_of(due).collect(due) for due in passes]

    def free_engines(self) -> None:
        """Destroy the engines with their contexts; no work is queued, and no graph contains them."""

    def close(self) -> None:
        """Free everything in the order that CUDA asks for: wait, graphs, contexts, memory, stream."""
        if not self.closed:
            self.cuda.sync()
            while self.batches:
                self.batches.popitem()[1].release()
            self.free_engines()
            self.cuda.close()
        super().close()
