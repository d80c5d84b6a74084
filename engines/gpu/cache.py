"""Device memory of sequences that are decoded side by side: H, Q, K and V by slot, and room for a pass.

Each sequence has a place. Within a layer the places lie one after the other, so
that one engine runs several sequences at once: H [L+1, N, S, d], Q [L, N, S, H, D],
K and V [L, N, G, S, D]. Nothing here knows parts, ids, or what a pass computes.
"""

from itertools import pairwise

from engines.config import Capacity, ModelConfig
from engines.gpu.buffers import cycles
from engines.gpu.cuda import Address, Cuda
from engines.runner import Slots


class Caches:
    """The caches of `places` sequences of `slots` slots each, of numbers of `element` bytes."""

    def __init__(self, cuda: Cuda, config: ModelConfig, capacity: Capacity, element: int, slots: int, batch_rows: int):
        self.cuda, self.slots, self.batch_rows = cuda, slots, batch_rows
        head, of = config.head_size * element, f" of {batch_rows} sequences" if batch_rows > 1 else ""
        self.width = {"h": config.d_model * element, "q": config.heads * head, "k": head, "v": head}
        self.planes = {"h": 1, "q": 1, "k": config.kv_heads, "v": config.kv_heads}  # of a sequence in one layer
        self.layers = {"h": config.layers + 1, "q": config.layers, "k": config.layers, "v": config.layers}
        self.base = {
            n: cuda.alloc(self.layers[n] * batch_rows * self.size(n), f"the cache of {n.upper()}{of}") for n in "hqkv"
        }
        self.spare = {
            n: cuda.alloc(self.layers[n] * self.planes[n] * self.width[n], "a row on the move") for n in "hqkv"
        }
        # Passes follow each other on one stream, so all places share what a pass needs beside its caches.
        together = batch_rows * capacity.rows
        rows = max(slots, together)
        self.q_prev = cuda.alloc(rows * self.width["q"], f"Q before a pass{of}")
        self.k_prev = cuda.alloc(rows * config.kv_heads * self.width["k"], f"K before a pass{of}")
        said = max(capacity.rows, batch_rows * capacity.window)
        self.logits = cuda.alloc(said * config.vocab * 4, f"the logits{of}")
        staged = [("h", "the rows that enter a layer"), ("h", "the rows that leave it"), ("q", "their Q")]
        self.staging = [cuda.alloc(together * self.width[n], what + of) for n, what in staged] if batch_rows > 1 else []

    def size(self, name: str) -> int:
        """Bytes of one layer of one sequence in a cache."""
        return self.planes[name] * self.slots * self.width[name]

    def at(self, name: str, index: int, batch_row: int) -> Address:
        """The address of a layer's part of a sequence's cache."""
        return self.base[name] + (index * self.batch_rows + batch_row) * self.size(name)

    def permute(self, batch_row: int, target: Slots, source: Slots) -> None:
        """Queue copies of a sequence's slots `source` to `target`, as if at once, through all layers."""
        for cycle in cycles(target, source):
            self._copy_row(batch_row, None, cycle[0])
            for to, where in pairwise(cycle):
                self._copy_row(batch_row, to, where)
            self._copy_row(batch_row, cycle[-1], None)

    def _copy_row(self, batch_row: int, target: int | None, source: int | None) -> None:
        """Queue the copies of one slot; None is the spare row."""
        for n in "hqkv":
            width, planes = self.width[n], self.planes[n]
            # A slot's row lies in every plane, `pitch` bytes apart; from layer to layer it is `height` planes.
            (to, to_pitch, to_height), (where, pitch, height) = (
                (self.spare[n], width, planes) if slot is None else
                (self.at(n, 0, batch_row) + slot * width, self.slots * width, self.batch_rows * planes)
                for slot in (target, source)
            )  # fmt: skip
            if planes == 1:
                self.cuda.copy_rows(to, to_pitch * to_height, where, pitch * height, width, self.layers[n])
            elif self.batch_rows == 1:
                self.cuda.copy_rows(to, to_pitch, where, pitch, width, self.layers[n] * planes)
            else:
                self.cuda.copy_planes(to, to_pitch, to_height, where, pitch, height, width, planes, self.layers[n])

    def relocate(self, target: int, source: int) -> None:
        """Queue copies of all that the place `source` holds to the place `target`."""
        for n in "hqkv":
            size = self.size(n)
            pitch = self.batch_rows * size
            self.cuda.copy_rows(self.at(n, 0, target), pitch, self.at(n, 0, source), pitch, size, self.layers[n])
