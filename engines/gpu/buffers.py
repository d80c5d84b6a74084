"""Pieces of device memory work: input embeddings, permutations of rows, and half-precision numbers."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.gpu.cuda import Address, Cuda
from engines.runner import Slots


class InputEmbeddings:
    """Embeddings [n, d] on the device, in the bundle's precision, that replace ids beyond the vocabulary."""

    def __init__(self, cuda: Cuda, embeddings: NDArray[np.float32], precision: str):
        raw = narrow(embeddings, precision)
        self.cuda, self.address = cuda, cuda.alloc(raw.nbytes, "the embeddings of a prompt")
        self.width = raw.nbytes // len(raw)
        cuda.upload(self.address, raw)
        cuda.sync()

    def copy_to(self, hidden: Address, rows: Slots) -> None:
        """Queue copies to the hidden states at `hidden`: slot s takes embedding `rows[s]`, unless that is negative."""
        slots = np.flatnonzero(rows >= 0)
        breaks = np.flatnonzero((np.diff(slots) != 1) | (np.diff(rows[slots]) != 1)) + 1
        for run in np.split(slots, breaks) if len(slots) else []:
            source = self.address + int(rows[run[0]]) * self.width
            self.cuda.copy(hidden + int(run[0]) * self.width, source, len(run) * self.width)

    def free(self) -> None:
        """Wait for queued copies and free the memory."""
        self.cuda.sync()
        self.cuda.free(self.address)


def cycles(target: Slots, source: Slots) -> Iterator[list[int]]:
    """The cycles of a permutation: each slot takes the row of the next in its cycle, the last that of the first."""
    follows = dict(zip(target.tolist(), source.tolist(), strict=True))
    assert set(follows) == set(follows.values()), "moves must be a permutation"
    while follows:
        start, following = follows.popitem()
        cycle = [start]
        while following != start:
            cycle.append(following)
            following = follows.pop(following)
        yield cycle


def pairs(moves: list[tuple[int, int]]) -> tuple[Slots, Slots]:
    """Targets and sources of moves, in ascending order of the targets."""
    target, source = np.array(sorted(moves), np.int64).T
    return target, source


def runs(slots: Slots) -> Iterator[tuple[int, int, int]]:
    """Where neighbouring slots follow each other in `slots`: (first slot, its place, their number)."""
    breaks = np.flatnonzero(np.diff(slots) != 1) + 1
    for places in np.split(np.arange(len(slots)), breaks):
        yield int(slots[places[0]]), int(places[0]), len(places)


def widen(raw: NDArray[np.uint8], precision: str) -> NDArray[np.float32]:
    """Convert raw bytes in `precision` (fp32, fp16, bf16) to float32; the last axis shrinks to the element count."""
    if precision == "bf16":
        return np.asarray((raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32))
    return raw.view(np.float16 if precision == "fp16" else np.float32).astype(np.float32)


def narrow(values: NDArray[np.float32], precision: str) -> NDArray[Any]:
    """Convert float32 to `precision` (fp32, fp16, bf16 as uint16); bf16 is rounded to the nearest, ties to even."""
    if precision == "bf16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.ascontiguousarray(values, np.float16 if precision == "fp16" else np.float32)
