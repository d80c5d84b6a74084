"""Device memory of sequences that are decoded side by side: H, Q, K and V by slot, and the buffers of a pass.

Each sequence has a batch row b. The batch rows of a layer lie one after the other, so that one engine can run
several sequences at once:

    H [L+1, B, S, d]   Q [L, B, S, H, D]   K and V [L, B, G, S, D]

H[l] holds the hidden states that enter layer l; H[L] holds those that leave the last.
"""

from collections.abc import Iterator

from engines.config import Capacity, ModelConfig
from engines.gpu.buffers import cycles, pairs, runs
from engines.gpu.cuda import Address, Cuda
from engines.runner import Slots

NAMES = "hqkv"  # the caches
SPARE = 32  # slots that are moved at once


class DeviceCaches:
    """The caches of `batch` sequences of `slots` slots each, with elements of `element` bytes."""

    def __init__(self, cuda: Cuda, config: ModelConfig, capacity: Capacity, element: int, slots: int, batch: int):
        self.cuda, self.slots, self.batch = cuda, slots, batch
        head, suffix = config.head_size * element, f" of {batch} sequences" if batch > 1 else ""
        # Bytes of a slot's row in one plane; planes of a sequence in one layer, [S, width] each; layers.
        self.width = {"h": config.d_model * element, "q": config.heads * head, "k": head, "v": head}
        self.planes = {"h": 1, "q": 1, "k": config.kv_heads, "v": config.kv_heads}
        self.layers = {"h": config.layers + 1, "q": config.layers, "k": config.layers, "v": config.layers}
        self.base = {
            name: cuda.alloc(self.layers[name] * batch * self.size(name), f"the cache of {name.upper()}{suffix}")
            for name in NAMES
        }
        # Rows of some slots in all layers, for permutations.
        self.spare_rows = max(2 * capacity.window, min(slots, SPARE))
        self.spare = {
            name: cuda.alloc(
                self.layers[name] * self.planes[name] * self.spare_rows * self.width[name], "the buffer of moved slots"
            )
            for name in NAMES
        }
        # Passes follow each other on one stream, so all sequences share the buffers of a pass.
        batched_rows = batch * capacity.rows
        rows = max(slots, batched_rows)
        # q [B, A, H, D] and k [B, G, A, D] of the active rows before a pass
        self.q_prev = cuda.alloc(rows * self.width["q"], f"Q before a pass{suffix}")
        self.k_prev = cuda.alloc(rows * config.kv_heads * self.width["k"], f"K before a pass{suffix}")
        # fp32 [B, W, V]
        logits_rows = max(capacity.rows, batch * capacity.window)
        self.logits = cuda.alloc(logits_rows * config.vocab * 4, f"the logits{suffix}")
        # Rows of several sequences side by side: two of [B, R, d], which layers alternate, and one of [B, R, H, D]
        staged = [("h", "the input of a layer"), ("h", "the output of a layer"), ("q", "the Q of a layer")]
        self.staging = [cuda.alloc(batched_rows * self.width[n], what + suffix) for n, what in staged if batch > 1]

    def size(self, name: str) -> int:
        """Bytes of one layer of one sequence in a cache."""
        return self.planes[name] * self.slots * self.width[name]

    def at(self, name: str, index: int, batch_row: int) -> Address:
        """The address of layer `index` of a sequence in a cache."""
        return self.base[name] + (index * self.batch + batch_row) * self.size(name)

    def permute(self, batch_row: int, target: Slots, source: Slots) -> None:
        """Queue copies of a sequence's slots `source` to `target` in all layers; the slots are the same set.

        All rows of some cycles go to the spare rows and from there to their slots, as many neighbours at once as there
        are: those that enter and leave the active rows mostly are.
        """
        for slots, rows in self._groups(target, source):
            for start, place, count in runs(rows):
                self._copy_rows(batch_row, (None, place), (start, None), count)
            for start, place, count in runs(slots):
                self._copy_rows(batch_row, (start, None), (None, place), count)

    def _groups(self, target: Slots, source: Slots) -> Iterator[tuple[Slots, Slots]]:
        """Targets and sources of cycles that fit the spare rows together, in ascending order of the targets."""
        moves: list[tuple[int, int]] = []
        for cycle in cycles(target, source):
            assert len(cycle) <= self.spare_rows, "a cycle of moves is longer than the spare rows"
            if len(moves) + len(cycle) > self.spare_rows:
                yield pairs(moves)
                moves = []
            moves += zip(cycle, [*cycle[1:], cycle[0]], strict=True)
        if moves:
            yield pairs(moves)

    def _copy_rows(
        self, batch_row: int, to: tuple[int | None, int | None], start: tuple[int | None, int | None], count: int
    ) -> None:
        """Queue the copies of `count` neighbouring slots in all caches and layers.

        `to` and `start` are (slot, None), or (None, spare row).
        """
        for name in NAMES:
            width, planes, layers = self.width[name], self.planes[name], self.layers[name]
            # The rows of successive planes are `pitch` bytes apart; those of successive layers, `height * pitch` bytes.
            (address, to_pitch, to_height), (where, pitch, height) = (
                (self.spare[name] + spare * width, self.spare_rows * width, planes) if spare is not None else
                (self.at(name, 0, batch_row) + int(slot or 0) * width, self.slots * width, self.batch * planes)
                for slot, spare in (to, start)
            )  # fmt: skip
            size = count * width
            if planes == 1:
                self.cuda.copy_rows(address, to_pitch * to_height, where, pitch * height, size, layers)
            elif self.batch == 1:
                self.cuda.copy_rows(address, to_pitch, where, pitch, size, layers * planes)
            else:
                self.cuda.copy_planes(address, to_pitch, to_height, where, pitch, height, size, planes, layers)

    def relocate(self, target: int, source: int) -> None:
        """Queue copies of the whole sequence at batch row `source` to batch row `target`."""
        for name in NAMES:
            size = self.size(name)
            pitch = self.batch * size
            self.cuda.copy_rows(
                self.at(name, 0, target), pitch, self.at(name, 0, source), pitch, size, self.layers[name]
            )
