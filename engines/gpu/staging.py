"""Small arrays that the host and the device exchange in one copy: the inputs that steer a pass, and its results."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.gpu.buffers import narrow
from engines.gpu.cuda import Address, Cuda, aligned
from engines.runner import DriftInputs, Slots

CONTROL: dict[str, Any] = {
    "ids": np.int64, "positions": np.int64, "block_ends": np.int64, "key_mask": np.bool_, "probe_keys": np.bool_,
    "tracked": np.bool_, "window": np.bool_, "rows": np.int64, "write_index": np.int64,
}  # fmt: skip
"""Arrays of a `ControlBuffer` and their element types; `rows` are the rows that the head reads."""
ELEMENTS: dict[str, Any] = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}  # NumPy has no bf16


class StagingBuffer:
    """Named small arrays in one piece of device memory, with a page-locked twin on the host.

    `address` holds the device address of each array. A queued copy may still read the host's arrays, so call
    `edit` before writing to them.
    """

    def __init__(self, cuda: Cuda, **arrays: tuple[tuple[int, ...], Any]):
        """`arrays` gives shape and element type of each array by name."""
        self.cuda, self.address, self.arrays = cuda, {}, {}
        sizes = {n: int(np.prod(shape)) * np.dtype(dtype).itemsize for n, (shape, dtype) in arrays.items()}
        ends = np.cumsum([aligned(size) for size in sizes.values()])
        self.host, base = cuda.pinned(int(ends[-1])), cuda.alloc(int(ends[-1]), "a staging buffer")
        for start, (name, (shape, dtype)) in zip([0, *ends.tolist()], arrays.items(), strict=False):
            self.arrays[name] = self.host[start : start + sizes[name]].view(dtype).reshape(shape)
            self.address[name] = base + start
        self.base, self.changed = base, True
        self.uploaded_at = -1  # `cuda.waits` when the last upload was queued

    def __getitem__(self, name: str) -> NDArray[Any]:
        return np.asarray(self.arrays[name])

    def edit(self) -> None:
        """Prepare for writing: wait for a queued upload, and let the next `upload` copy the arrays again."""
        if self.uploaded_at == self.cuda.waits:
            self.cuda.sync()
        self.changed = True

    def upload(self) -> None:
        """Queue a copy to the device if the arrays were edited."""
        if self.changed:
            self.cuda.upload(self.base, self.host)
            self.changed, self.uploaded_at = False, self.cuda.waits

    def download(self) -> None:
        """Queue a copy from the device; the arrays hold the values after the next wait."""
        self.cuda.download(self.host, self.base)

    def fetch(self) -> None:
        """Copy from the device and wait for it, and for all work queued before."""
        self.download()
        self.cuda.sync()


class ControlBuffer(StagingBuffer):
    """The inputs of B sequences that steer a pass: ids, positions, masks, and the rows that tests and head read.

    Each array of `CONTROL` is flat, [B · width] with its width in `widths`. `key_bias`, in the bundle's precision, is
    what engines read in place of `key_mask`; it and `block_ends` are computed when the arrays are uploaded.
    """

    def __init__(self, cuda: Cuda, batch: int, widths: dict[str, int], precision: str):
        widths = {"block_ends": widths["positions"]} | widths
        arrays = {name: ((batch * widths[name],), dtype) for name, dtype in CONTROL.items()}
        super().__init__(cuda, **arrays, key_bias=((batch * widths["key_mask"],), ELEMENTS[precision]))
        self.precision = precision
        self.block_length: int | None = None  # where attention is block-causal

    def upload(self) -> None:
        """Queue a copy to the device if the arrays were edited."""
        if self.changed:
            bias = np.where(self["key_mask"], 0, -np.inf).astype(np.float32)
            self["key_bias"][:] = narrow(bias[None], self.precision)[0].view(self["key_bias"].dtype)
            if self.block_length is not None:
                self["block_ends"][:] = (self["positions"] // self.block_length + 1) * self.block_length
        super().upload()

    def set_drift_inputs(self, drift_inputs: DriftInputs) -> None:
        """Write the rows and keys that drift test and probe read, if they differ from what is there (one sequence).

        Tracked rows and window must be among the first rows, which the tests read.
        """
        arrays = {"probe_keys": drift_inputs.probe_keys}
        for name, slots in (("tracked", drift_inputs.tracked), ("window", drift_inputs.window)):
            arrays[name] = np.zeros(len(self[name]), bool)
            arrays[name][slots] = True
        if any(not np.array_equal(self[name], array) for name, array in arrays.items()):
            self.edit()
            for name, array in arrays.items():
                self[name][:] = array

    def set_head_rows(self, rows: Slots) -> None:
        """Write the rows that the head reads; the head computes row 0 where there are fewer than its width."""
        self.edit()
        self["rows"][:] = 0
        self["rows"][: len(rows)] = rows


class ResultBuffer(StagingBuffer):
    """The results of a pass of B sequences: sigma [L, B], probe [L, B · K], token and confidence [B · `rows`].

    Engines write sigma and probe of one layer at a time, so each layer has a line of its own that is aligned.
    """

    def __init__(self, cuda: Cuda, batch: int, layers: int, track_num: int, rows: int):
        lines = {"sigma": aligned(4 * batch) // 4, "probe": aligned(8 * batch * track_num) // 8}
        super().__init__(
            cuda, sigma=((layers, lines["sigma"]), np.float32), probe=((layers, lines["probe"]), np.int64),
            token=((batch * rows,), np.int64), confidence=((batch * rows,), np.float32),
        )  # fmt: skip

    def line(self, name: str, layer: int) -> Address:
        """The device address of the line of a layer in `sigma` or `probe`."""
        address: Address = self.address[name] + layer * self[name][0].nbytes
        return address
