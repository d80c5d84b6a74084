"""A model whose parts run on a GPU: what its back ends share.

It hands out walks on memory that serves one batch of sequences after the other,
and runs their reuse passes as one where it can. How an engine is run the back
ends know. Nothing here knows windows, gamma or text.
"""

import numpy as np
from numpy.typing import NDArray

from engines.cuda import Cuda
from engines.device_batch import Batch, walk_of
from engines.device_parts import Engine, Ports
from engines.device_walk import DeviceWalk
from engines.errors import BackendError
from engines.session import Model
from engines.walk import Pass, Reuse


class DeviceModel(Model):
    """A model whose parts run on a GPU. `weights` are ports of the parts' engines, if they are not in them."""

    cuda: Cuda
    weights: dict[str, Ports]
    capturable: bool  # whether what an engine queues may be captured as a graph
    batches: dict[int, Batch]  # by slots

    def engine(self, part: str, slots: int) -> Engine:
        """The engine of `part` for walks of `slots` slots."""
        raise NotImplementedError

    def slots_of(self, length: int) -> int:
        """Slots of a walk that has room for `length` positions and a reuse pass's dummies."""
        raise NotImplementedError

    def walk(self, length: int, limit: int | None = None) -> DeviceWalk:
        return self.walks([(length, limit or length)])[0]

    def walks(self, spans: list[tuple[int, int]]) -> list[DeviceWalk]:
        """Walks with as many slots each, those of the longest: one engine runs them all, and whole passes of short
        sequences cost what the longest one's do."""
        slots = self.slots_of(max(limit for _, limit in spans))
        if slots in self.batches and len(self.batches[slots].walks) < len(spans):
            self.batches.pop(slots).release()
        if slots not in self.batches:
            self.batches[slots] = self._take(slots, len(spans))
        return self.batches[slots].start([length for length, _ in spans])

    def _take(self, slots: int, places: int) -> Batch:
        """Memory for a batch; where it does not fit, that of other lengths, which serves nobody now, is given back."""
        known = len(self.cuda.owned)
        try:
            return Batch(self, slots, places)
        except BackendError:
            self.cuda.sync()
            for address in self.cuda.owned[known:]:
                self.cuda.free(address)
            if not self.batches:
                raise
        while self.batches:
            self.batches.popitem()[1].release()
        return self._take(slots, places)

    def reuse(self, passes: list[Pass]) -> list[Reuse]:
        """As one pass where they join. Otherwise, where engines cannot be captured or rows differ, one after the
        other, with one wait at the end."""
        if len(passes) < 2 or not all(walk_of(due).ahead(due) for due in passes):
            return super().reuse(passes)
        batch = self.batches[passes[0].walk.slots]
        if batch.joins(passes):
            return batch.reuse(passes)
        for due in passes:
            walk_of(due).queue(due)
        self.cuda.sync()
        return [walk_of(due).collect(due) for due in passes]

    def forward(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        logits = []
        for row in ids:
            walk = self.walk(len(row))
            count = walk.slots if walk.filled else len(row)
            walk.embed(np.concatenate([row, np.zeros(count - len(row), np.int64)]))
            walk.whole(count, None)
            logits.append(walk.logits(np.arange(len(row))))
        return np.stack(logits)

    def close(self) -> None:
        if not self.closed:
            self.batches.clear()
            self.cuda.close()
        super().close()
