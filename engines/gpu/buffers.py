"""Small things of device memory: a block of arrays sent as one, given rows, moves, half-precision numbers."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.gpu.cuda import Address, Cuda
from engines.runner import Slots


class StagingBuffer:
    """Small arrays in one piece of device memory, moved by one copy.

    Host arrays are views of page-locked memory, which a queued copy may still be
    reading: `edit` waits for it. `address` names their device twins.
    """

    def __init__(self, cuda: Cuda, **shapes: tuple[tuple[int, ...], Any]):
        self.cuda, self.address, self.arrays = cuda, {}, {}
        sizes = {n: int(np.prod(shape)) * np.dtype(dtype).itemsize for n, (shape, dtype) in shapes.items()}
        ends = np.cumsum([-(-size // 256) * 256 for size in sizes.values()])
        self.host, base = cuda.pinned(int(ends[-1])), cuda.alloc(int(ends[-1]), "a control block")
        for start, (name, (shape, dtype)) in zip([0, *ends.tolist()], shapes.items(), strict=False):
            self.arrays[name] = self.host[start : start + sizes[name]].view(dtype).reshape(shape)
            self.address[name] = base + start
        self.base, self.changed, self.sent = base, True, -1

    def __getitem__(self, name: str) -> NDArray[Any]:
        return np.asarray(self.arrays[name])

    def edit(self) -> None:
        """Call before writing: the arrays will be sent again."""
        if self.sent == self.cuda.waits:
            self.cuda.sync()
        self.changed = True

    def send(self) -> None:
        """Queue a copy to the device, if there was an edit."""
        if self.changed:
            self.cuda.upload(self.base, self.host)
            self.changed, self.sent = False, self.cuda.waits

    def ask(self) -> None:
        """Queue a copy from the device."""
        self.cuda.download(self.host, self.base)

    def fetch(self) -> "StagingBuffer":
        """Copy from the device and wait for it, and for everything queued before."""
        self.ask()
        self.cuda.sync()
        return self


class InputEmbeddings:
    """Embeddings on the device that ids beyond a vocabulary stand for, until `free`."""

    def __init__(self, cuda: Cuda, embeddings: NDArray[np.float32], precision: str):
        raw = narrow(embeddings, precision)
        self.cuda, self.address = cuda, cuda.alloc(raw.nbytes, "the embeddings of a prompt")
        self.width = raw.nbytes // len(raw)
        cuda.upload(self.address, raw)
        cuda.sync()

    def batch_row(self, hidden: Address, rows: Slots) -> None:
        """Queue copies to H of a layer: row `rows[slot]` to each slot, unless it is negative."""
        slots = np.flatnonzero(rows >= 0)
        breaks = np.flatnonzero((np.diff(slots) != 1) | (np.diff(rows[slots]) != 1)) + 1
        for run in np.split(slots, breaks) if len(slots) else []:
            source = self.address + int(rows[run[0]]) * self.width
            self.cuda.copy(hidden + int(run[0]) * self.width, source, len(run) * self.width)

    def free(self) -> None:
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


def widen(raw: NDArray[np.uint8], precision: str) -> NDArray[np.float32]:
    """Rows of bytes in a bundle's precision, as float32."""
    if precision == "bf16":
        return np.asarray((raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32))
    return raw.view(np.float16 if precision == "fp16" else np.float32).astype(np.float32)


def narrow(values: NDArray[np.float32], precision: str) -> NDArray[Any]:
    """float32 in a bundle's precision; bf16 is rounded to the nearest even."""
    if precision == "bf16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.ascontiguousarray(values, np.float16 if precision == "fp16" else np.float32)
