"""Weights from disk to the GPU: one allocation for all tensors of a part, and reading while a piece is copied."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.gpu.cuda import Address, Cuda, aligned
from engines.gpu.executor import Bindings
from engines.weights import Entry, locate

PIECE = 32 << 20  # bytes that are read and copied at a time


class Uploader:
    """Copies weight files to a GPU through two buffers of page-locked memory, which `close` frees."""

    def __init__(self, cuda: Cuda, piece: int = PIECE):
        self.cuda, self.piece = cuda, piece
        known = len(cuda.owned)
        self.buffers = [cuda.pinned(piece) for _ in range(2)]
        self.owned = cuda.owned[known:]
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="weights")

    def upload(self, path: Path, part: str) -> Bindings:
        """Copy the tensors of the weight file of `part`; returns address and shape of each, all in one allocation.

        Every address is aligned. Raises BackendError if they do not fit, OSError as the disk does.
        """
        entries = locate(path)
        base = self.cuda.alloc(sum(aligned(entry.length) for entry in entries.values()), f"the weights of {part}")
        bindings: Bindings = {}
        for name, entry in entries.items():
            bindings[name] = base, entry.shape
            base += aligned(entry.length)
        pieces = list(self._pieces(entries, bindings))
        with path.open("rb", buffering=0) as file:

            def read(number: int) -> NDArray[np.uint8]:
                _, offset, size = pieces[number]
                buffer = self.buffers[number % 2][:size]
                file.seek(offset)
                done = 0
                while done < size:  # a raw file may return less than it is asked for
                    count = file.readinto(buffer[done:].data)
                    if not count:
                        raise OSError(f"{path} ends too early")
                    done += count
                return buffer

            coming = self.reader.submit(read, 0) if pieces else None
            for number, (target, _, _) in enumerate(pieces):
                assert coming is not None
                content = coming.result()
                coming = self.reader.submit(read, number + 1) if number + 1 < len(pieces) else None
                self.cuda.upload(target, content)
                self.cuda.sync()  # while the next piece is read into the other buffer
        return bindings

    def _pieces(self, entries: dict[str, Entry], bindings: Bindings) -> Iterator[tuple[Address, int, int]]:
        """Target address, offset in the file and size of each piece, in the file's order."""
        for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
            for start in range(0, entry.length, self.piece):
                size = min(self.piece, entry.length - start)
                yield bindings[name][0] + start, entry.offset + start, size

    def close(self) -> None:
        """Free the buffers."""
        self.reader.shutdown()
        for address in self.owned:
            self.cuda.free(address)
