"""Parts on the first rows of one sequence or of several at once: which memory each port of an engine is.

The rows of one sequence lie together, so that engines read and write them in its
caches. Those of several do not: hidden states and Q go through staging buffers
[B, R, …] there, and what a part leaves in them is copied to each sequence's rows.
Nothing here knows a back end, gamma, or whose rows they are.
"""

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from engines.config import layer_name
from engines.gpu.buffers import StagingBuffer
from engines.gpu.cache import Caches
from engines.gpu.cuda import Address, Cuda

if TYPE_CHECKING:
    from engines.gpu.model import GpuModel

Bindings = dict[str, tuple[Address, tuple[int, ...]]]  # each port's place in device memory, and its shape

REUSE, WHOLE, GENERAL = 0, 1, 2  # profiles of embed and layer
ANY = 1  # the other parts have REUSE and this

CONTROL: dict[str, Any] = {
    "ids": np.int64, "positions": np.int64, "key_mask": np.bool_, "probe_keys": np.bool_, "tracked": np.bool_,
    "window": np.bool_, "rows": np.int64, "write_index": np.int64,
}  # fmt: skip


def control_buffer(cuda: Cuda, batch: int, widths: dict[str, int]) -> StagingBuffer:
    """What engines are told about `batch` sequences: arrays of that many times `widths` numbers."""
    return StagingBuffer(cuda, **{name: ((batch * widths[name],), dtype) for name, dtype in CONTROL.items()})


def result_buffer(cuda: Cuda, batch: int, layers: int, tracked: int, rows: int) -> StagingBuffer:
    """What engines say about `batch` sequences; `rows` of each are predicted at most."""
    return StagingBuffer(
        cuda, sigma=((layers * batch,), np.float32), probe=((layers * batch * tracked,), np.int64),
        token=((batch * rows,), np.int64), confidence=((batch * rows,), np.float32),
    )  # fmt: skip


class Engine(Protocol):
    """A part that can be queued: `profile` is one of REUSE, WHOLE, GENERAL (or ANY)."""

    def run(self, profile: int, ports: Bindings) -> None: ...


class PassQueue:
    """Queues parts over the first rows of the `batch` sequences from the place `first` on."""

    def __init__(
        self, model: "GpuModel", caches: Caches, control: StagingBuffer, result: StagingBuffer, first: int = 0
    ):
        self.model, self.cuda, self.caches = model, model.cuda, caches
        self.config, self.capacity = model.config, model.capacity
        self.control, self.result = control, result
        self.first, self.batch = first, 1
        self.graphs: dict[Hashable, Any] = {}  # None after the first run, which warms the engines up

    def replay(self, key: Hashable, work: Callable[[], None]) -> None:
        """Queue `work`, which queues the same under the same key: as a graph from the second time on, if it may be."""
        graph = self.graphs.get(key)
        if graph is None and key in self.graphs and self.model.capturable:
            graph = self.graphs[key] = self.cuda.capture(work)
        if graph is not None:
            self.cuda.launch(graph)
        else:
            work()
            self.graphs[key] = None

    def release(self) -> None:
        """Give the graphs back."""
        for graph in self.graphs.values():
            if graph is not None:
                self.cuda.destroy(graph)
        self.graphs.clear()

    def reuse(self, rows: int, kind: str, probed: int, embeds: bool = True) -> None:
        """Queue a whole reuse pass: embed, every layer with its drift test and probe, and the head."""
        if embeds:
            self.embed(rows)
        for index in range(self.config.layers):
            self.save_previous(index, rows)
            self.layer(index, rows)
            self.drift(index, rows, kind)
            self.probe(index, probed)
        self.head(self.capacity.window)

    def embed(self, rows: int) -> None:
        hidden = self._hidden(0), (self.batch, rows, self.config.d_model)
        self._run("embed", self._profile(rows), ids=self._told("ids", rows), hidden=hidden)
        self._store("h", 0, rows, hidden[0])

    def layer(self, index: int, rows: int) -> None:
        hidden, q = (self.batch, rows, self.config.d_model), (self._q(index), self._heads(rows))
        leaving = self._hidden(index + 1)
        k, v = self._keys("k", index), self._keys("v", index)
        self._run(
            layer_name(index), self._profile(rows), hidden=(self._hidden(index), hidden),
            positions=self._told("positions", rows), key_mask=self._told("key_mask", self.caches.slots),
            write_index=(self.control.address["write_index"], (self.batch,)),
            k_cache=k, v_cache=v, k_cache_out=k, v_cache_out=v, hidden_out=(leaving, hidden), q=q,
        )  # fmt: skip
        self._store("h", index + 1, rows, leaving)
        self._store("q", index, rows, q[0])

    def save_previous(self, index: int, rows: int) -> None:
        """Copy Q and K of the first rows aside: what the drift test compares with."""
        caches, slots = self.caches, self.caches.slots
        for name, target in (("q", caches.q_prev), ("k", caches.k_prev)):
            width, planes = caches.width[name], self.batch * caches.planes[name]
            source = caches.at(name, index, self.first)
            self.cuda.copy_rows(target, rows * width, source, slots * width, rows * width, planes)

    def drift(self, index: int, rows: int, kind: str) -> None:
        slots, before = self.caches.slots, (self.batch, self.config.kv_heads, rows, self.config.head_size)
        self._run(
            f"drift_{kind}", REUSE if rows == self.capacity.rows else ANY,
            q_prev=(self.caches.q_prev, self._heads(rows)), q_now=(self._q(index), self._heads(rows)),
            tracked_rows=self._told("tracked", rows), k_prev=(self.caches.k_prev, before),
            k_cache=self._keys("k", index), key_mask=self._told("key_mask", slots),
            sigma=self._said("sigma", 4 * index * self.batch),
        )  # fmt: skip

    def probe(self, index: int, rows: int) -> None:
        slots, count = self.caches.slots, self.capacity.track_num
        self._run(
            "probe", REUSE if rows == self.capacity.rows else ANY, q_window=(self._q(index), self._heads(rows)),
            window_rows=self._told("window", rows), probe_keys=self._told("probe_keys", slots),
            k_cache=self._keys("k", index), key_mask=self._told("key_mask", slots),
            probe=self._said("probe", 8 * index * self.batch * count, count),
        )  # fmt: skip

    def head(self, rows: int) -> None:
        c = self.config
        hidden = self.caches.at("h", c.layers, self.first), (self.batch, self.caches.slots, c.d_model)
        self._run(
            "head", REUSE if rows == self.capacity.window else ANY, hidden=hidden, rows=self._told("rows", rows),
            token=self._said("token", 0, rows), confidence=self._said("confidence", 0, rows),
            logits=(self.caches.logits, (self.batch, rows, c.vocab)),
        )  # fmt: skip

    def _hidden(self, index: int) -> Address:
        """The rows that enter a layer; two staging buffers take turns, for no layer may write what it reads."""
        return self.caches.at("h", index, self.first) if self.batch == 1 else self.caches.staging[index % 2]

    def _q(self, index: int) -> Address:
        return self.caches.at("q", index, self.first) if self.batch == 1 else self.caches.staging[2]

    def _store(self, name: str, index: int, rows: int, staged: Address) -> None:
        """Copy staged rows to those of each sequence; those of one are there already."""
        if self.batch > 1:
            width, pitch = rows * self.caches.width[name], self.caches.size(name)
            self.cuda.copy_rows(self.caches.at(name, index, self.first), pitch, staged, width, width, self.batch)

    def _heads(self, rows: int) -> tuple[int, ...]:
        return self.batch, rows, self.config.heads, self.config.head_size

    def _keys(self, name: str, index: int) -> tuple[Address, tuple[int, ...]]:
        shape = self.batch, self.config.kv_heads, self.caches.slots, self.config.head_size
        return self.caches.at(name, index, self.first), shape

    def _told(self, name: str, width: int) -> tuple[Address, tuple[int, ...]]:
        return self.control.address[name], (self.batch, width)

    def _said(self, name: str, offset: int, *width: int) -> tuple[Address, tuple[int, ...]]:
        return self.result.address[name] + offset, (self.batch, *width)

    def _profile(self, rows: int) -> int:
        return {self.capacity.rows: REUSE, self.caches.slots: WHOLE}.get(rows, GENERAL)

    def _run(self, part: str, profile: int, **ports: tuple[Address, tuple[int, ...]]) -> None:
        self.model.engine(part, self.caches.slots).run(profile, ports | self.model.weights.get(part, {}))
