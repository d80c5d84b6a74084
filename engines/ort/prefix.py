"""The state of a prefix out of and into the caches of a sequence on the CPU."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from engines.ort.workspace import Workspace
from engines.runner import PrefixState, Slots


class PrefixRows:
    """The part of a runner that reads and writes the rows of a prefix; caches are by position."""

    work: Workspace
    length: int
    h: NDArray[np.float32]  # [L + 1, limit, d]
    k: NDArray[np.float32]  # [L, 1, G, S, D], as v, and q with H for G
    v: NDArray[np.float32]
    q: NDArray[np.float32]
    row_of: Slots
    slot_at: Slots

    def arrange(self, position_at: Slots) -> None:
        self.row_of[: self.length] = position_at[: self.length]
        self.slot_at[self.row_of[: self.length]] = np.arange(self.length)

    def prefix_state(self, count: int) -> PrefixState:
        content = [cache[..., self.row_of[:count], :] for cache in self._caches()]
        return PrefixState(self.work.sessions, content, count, sum(array.nbytes for array in content))

    def set_prefix_state(self, state: PrefixState, slot: int) -> None:
        rows = self.row_of[slot : slot + state.rows]
        for cache, content in zip(self._caches(), state.of(self.work.sessions), strict=True):
            cache[..., rows, :] = content

    def _caches(self) -> Iterator[NDArray[np.float32]]:
        """H of the layers but the first, and K, V and Q: rows are the last axis but one."""
        yield from (self.h[1:-1], self.k, self.v, self.q)
