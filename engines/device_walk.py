"""One sequence on a GPU: its caches in device memory, and its reuse pass as one CUDA graph.

Where its engines can be captured, a reuse pass always runs `capacity.rows` rows,
the missing ones filled with dummies, so that shapes and addresses never change:
embed, all layers with their drift tests and probes, and the head are captured
once and launched once a step. Either way the host waits once, at the end. How an
engine is run its model knows. Nothing here knows a back end, windows, gamma or text.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.cuda import Address, Cuda
from engines.device_memory import Block, cycles, narrow, widen
from engines.errors import BackendError
from engines.session import Model, Reuse, Slots, SteppedWalk, Watch
from engines.spec import layer_name
from engines.weights import SIZES

Ports = dict[str, tuple[Address, tuple[int, ...]]]  # each port's place in device memory, and its shape

REUSE, WHOLE, GENERAL = 0, 1, 2  # profiles of embed and layer
ANY = 1  # the other parts have REUSE and this


class Engine(Protocol):
    """A part that can be queued: `profile` is one of REUSE, WHOLE, GENERAL (or ANY)."""

    def run(self, profile: int, ports: Ports) -> None: ...


class DeviceModel(Model):
    """A model whose parts run on a GPU. `weights` are ports of the parts' engines, if they are not in them."""

    cuda: Cuda
    weights: dict[str, Ports]
    capturable: bool  # whether what an engine queues may be captured as a graph
    walks: dict[
        tuple[int, int], "DeviceWalk"
    ]  # by slots and place: memory and graphs serve one sequence after the other

    def engine(self, part: str, slots: int) -> Engine:
        """The engine of `part` for walks of `slots` slots."""
        raise NotImplementedError

    def slots_of(self, length: int) -> int:
        """Slots of a walk that has room for `length` positions and a reuse pass's dummies."""
        raise NotImplementedError

    def walk(self, length: int, limit: int | None = None, place: int = 0) -> "DeviceWalk":
        key = self.slots_of(limit or length), place
        if key not in self.walks:
            known = len(self.cuda.owned)
            try:
                self.walks[key] = DeviceWalk(self, key[0])
            except BackendError:
                for address in self.cuda.owned[known:]:
                    self.cuda.free(address)
                raise
        self.walks[key].start(length)
        return self.walks[key]

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
            self.walks.clear()
            self.cuda.close()
        super().close()


class DeviceWalk(SteppedWalk):
    """The caches of one sequence on the GPU, and the graphs of its reuse pass."""

    def __init__(self, model: DeviceModel, slots: int):
        config, capacity, cuda = model.config, model.capacity, model.cuda
        super().__init__(config, slots - capacity.rows, slots, filled=capacity.rows if model.capturable else 0)
        self.optimistic = True
        self.model, self.cuda, self.capacity = model, cuda, capacity
        layers, element = config.layers, SIZES[model.bundle.manifest.precision]
        head = config.head_size * element
        # A cache is planes of slots: one stride takes a slot's row through all of them.
        self.planes = {"h": layers + 1, "q": layers, "k": layers * config.kv_heads, "v": layers * config.kv_heads}
        self.width = {"h": config.d_model * element, "q": config.heads * head, "k": head, "v": head}
        self.base = {n: cuda.alloc(self.planes[n] * slots * self.width[n], f"the cache of {n.upper()}") for n in "hqkv"}
        self.spare = {n: cuda.alloc(self.planes[n] * self.width[n], "a row on the move") for n in "hqkv"}
        self.q_prev = cuda.alloc(slots * self.width["q"], "Q before a pass")
        self.k_prev = cuda.alloc(config.kv_heads * slots * self.width["k"], "K before a pass")
        self.logits_at = cuda.alloc(capacity.rows * config.vocab * 4, "the logits")
        self.control = Block(
            cuda, ids=((slots,), np.int64), positions=((slots,), np.int64), key_mask=((slots,), np.bool_),
            probe_keys=((slots,), np.bool_), tracked=((slots,), np.bool_), window=((slots,), np.bool_),
            rows=((capacity.rows,), np.int64), write_index=((1,), np.int64),
        )  # fmt: skip
        self.result = Block(
            cuda, sigma=((layers,), np.float32), probe=((layers, capacity.track_num), np.int64),
            token=((capacity.rows,), np.int64), confidence=((capacity.rows,), np.float32),
        )  # fmt: skip
        self.graphs: dict[str, Any] = {}  # by drift test; None after the first pass, which warms the engines up

    def start(self, length: int) -> None:
        """Begin a sequence: position p in slot p; slots from `length` on are dummies, masked as keys."""
        self.length = length
        self.control.edit()
        self.control["positions"][:] = np.minimum(np.arange(self.slots), self.config.max_length - 1)
        self.control["key_mask"][:] = np.arange(self.slots) < length
        self.unembedded = 0  # rows whose ids are not embedded yet
        self.predicted: dict[int, int] = {}  # slot -> its place in the head's last result, while that holds

    def extend(self, slots: Slots) -> None:
        self.length += len(slots)
        self.control.edit()
        self.control["key_mask"][slots] = True

    def move(self, target: Slots, source: Slots) -> None:
        if not len(target):
            return
        self.control.edit()
        for name in ("positions", "key_mask"):
            self.control[name][target] = self.control[name][source]
        self.predicted = {}
        for cycle in cycles(target, source):
            self._copy_row(None, cycle[0])
            for to, where in pairwise(cycle):
                self._copy_row(to, where)
            self._copy_row(cycle[-1], None)

    def _copy_row(self, target: int | None, source: int | None) -> None:
        """Queue the copies of one slot through all layers; None is the spare row."""
        for n in "hqkv":
            width = self.width[n]
            places = [
                (self.spare[n], width) if slot is None else (self.base[n] + slot * width, self.slots * width)
                for slot in (target, source)
            ]
            self.cuda.copy_rows(*places[0], *places[1], width, self.planes[n])

    def at(self, name: str, index: int) -> Address:
        """The address of a layer's part of a cache."""
        planes = self.planes[name] // (self.config.layers if name != "h" else self.config.layers + 1)
        return self.base[name] + index * planes * self.slots * self.width[name]

    def embed(self, ids: Slots) -> None:
        self.control.edit()
        self.control["ids"][: len(ids)] = ids
        self.unembedded = len(ids)

    def layer(self, index: int, rows: int) -> None:
        self._prepare(None)
        self._layer(index, rows)

    def before(self, index: int, rows: int, watch: Watch) -> Any:
        self._prepare(watch)
        self._keep(index, rows)
        return rows

    def drift(self, index: int, before: Any, watch: Watch) -> float:
        self._prepare(watch)
        self._drift(index, before, watch.kind)
        return float(self.result.fetch()["sigma"][index])

    def probe(self, index: int, watch: Watch) -> Slots:
        self._prepare(watch)
        self._probe(index, watch)
        return np.array(self.result.fetch()["probe"][index])

    def whole(self, rows: int, watch: Watch | None, first: int = 0) -> list[Slots]:
        self._prepare(watch)
        for index in range(first, self.config.layers):
            self._layer(index, rows)
            if watch is not None:
                self._probe(index, watch)
        return [] if watch is None else list(self.result.fetch()["probe"][first:].copy())

    def reuse(self, rows: int, watch: Watch, gamma: float) -> Reuse:
        """The whole pass at once, unless it has other rows than were captured; then layer by layer."""
        if not self.optimistic or rows not in (self.filled or rows,) or len(watch.window) > self.capacity.window:
            return super().reuse(rows, watch, gamma)
        self._point_head(watch.readers)
        self._prepare(watch, embed=False)
        graph = self.graphs.get(watch.kind)
        if graph is not None:
            self.cuda.launch(graph)
        elif watch.kind not in self.graphs or not self.model.capturable:
            self._pass(rows, watch)
            self.graphs[watch.kind] = None
        else:
            self.graphs[watch.kind] = graph = self.cuda.capture(lambda: self._pass(rows, watch))
            self.cuda.launch(graph)
        self.unembedded = 0
        result = self.result.fetch()
        self.predicted = {int(slot): place for place, slot in enumerate(watch.readers)}
        return Reuse.of(result["sigma"].tolist(), list(result["probe"].copy()), gamma)

    def _pass(self, rows: int, watch: Watch) -> None:
        """Queue embed, every layer with its drift test and probe, and the head."""
        self._embed(rows)
        for index in range(self.config.layers):
            self._keep(index, rows)
            self._layer(index, rows)
            self._drift(index, rows, watch.kind)
            self._probe(index, watch)
        self._head(self.capacity.window)

    def head(self, rows: Slots) -> tuple[Slots, NDArray[np.float32]]:
        if self.predicted.keys() >= set(rows.tolist()):
            places = [self.predicted[slot] for slot in rows.tolist()]
            return self.result["token"][places], self.result["confidence"][places]
        chunks = [(r["token"][: len(c)].copy(), r["confidence"][: len(c)].copy()) for c, r in self._heads(rows)]
        token, confidence = map(np.concatenate, zip(*chunks, strict=True))
        return token, confidence

    def logits(self, rows: Slots) -> NDArray[np.float32]:
        chunks = []
        for chunk, _ in self._heads(rows):
            logits = np.empty((len(chunk), self.config.vocab), np.float32)
            self.cuda.download(logits, self.logits_at)
            self.cuda.sync()
            chunks.append(logits)
        return np.concatenate(chunks)

    def _heads(self, rows: Slots) -> Iterator[tuple[Slots, Block]]:
        """Run the head chunk by chunk; yields each chunk and the results, which hold until the next."""
        step = self.capacity.window if len(rows) <= self.capacity.window else self.capacity.rows
        for start in range(0, len(rows), step):
            chunk = rows[start : start + step]
            self._point_head(chunk)
            self._prepare(None)
            self._head(step)
            yield chunk, self.result.fetch()

    def hidden(self, index: int, rows: int) -> NDArray[np.float32]:
        self._prepare(None)
        raw = np.empty((rows, self.width["h"]), np.uint8)
        self.cuda.download(raw, self.at("h", index))
        self.cuda.sync()
        return widen(raw, self.model.bundle.manifest.precision)

    def set_hidden(self, index: int, hidden: NDArray[np.float32]) -> None:
        self._prepare(None)
        raw = narrow(hidden, self.model.bundle.manifest.precision)
        self.cuda.upload(self.at("h", index), raw)
        self.cuda.sync()
        self.predicted = {}

    def _prepare(self, watch: Watch | None, embed: bool = True) -> None:
        """Send the control block if it changed, and embed what waits for it."""
        if watch is not None:
            wanted = {"probe_keys": watch.probe_keys}
            for name, slots in (("tracked", watch.tracked), ("window", watch.window)):
                wanted[name] = np.zeros(self.slots, bool)
                wanted[name][slots] = True
            if any(not np.array_equal(self.control[name], value) for name, value in wanted.items()):
                self.control.edit()
                for name, value in wanted.items():
                    self.control[name][:] = value
        self.control.send()
        if embed and self.unembedded:
            self._embed(self.unembedded)
            self.unembedded = 0

    def _point_head(self, rows: Slots) -> None:
        self.control.edit()
        self.control["rows"][:] = 0
        self.control["rows"][: len(rows)] = rows

    def _profile(self, rows: int) -> int:
        return {self.capacity.rows: REUSE, self.slots: WHOLE}.get(rows, GENERAL)

    def _run(self, part: str, profile: int, **ports: tuple[Address, tuple[int, ...]]) -> None:
        self.model.engine(part, self.slots).run(profile, ports | self.model.weights.get(part, {}))

    def _control(self, name: str, *shape: int) -> tuple[Address, tuple[int, ...]]:
        return self.control.address[name], shape

    def _result(self, name: str, offset: int, *shape: int) -> tuple[Address, tuple[int, ...]]:
        return self.result.address[name] + offset, shape

    def _embed(self, rows: int) -> None:
        hidden = self.base["h"], (1, rows, self.config.d_model)
        self._run("embed", self._profile(rows), ids=self._control("ids", 1, rows), hidden=hidden)

    def _layer(self, index: int, rows: int) -> None:
        c, slots = self.config, self.slots
        self.predicted = {}
        hidden, cache = (1, rows, c.d_model), (1, c.kv_heads, slots, c.head_size)
        k, v = (self.at("k", index), cache), (self.at("v", index), cache)
        self._run(
            layer_name(index), self._profile(rows), hidden=(self.at("h", index), hidden),
            positions=self._control("positions", 1, rows), key_mask=self._control("key_mask", 1, slots),
            write_index=self._control("write_index", 1), k_cache=k, v_cache=v, k_cache_out=k, v_cache_out=v,
            hidden_out=(self.at("h", index + 1), hidden), q=(self.at("q", index), (1, rows, c.heads, c.head_size)),
        )  # fmt: skip

    def _keep(self, index: int, rows: int) -> None:
        """Copy Q and K of the first rows aside: what the drift test compares with."""
        q, k = self.width["q"], self.width["k"]
        self.cuda.copy(self.q_prev, self.at("q", index), rows * q)
        self.cuda.copy_rows(self.k_prev, rows * k, self.at("k", index), self.slots * k, rows * k, self.config.kv_heads)

    def _drift(self, index: int, rows: int, kind: str) -> None:
        c = self.config
        heads, cache = (1, rows, c.heads, c.head_size), (1, c.kv_heads, self.slots, c.head_size)
        self._run(
            f"drift_{kind}", REUSE if rows == self.capacity.rows else ANY, q_prev=(self.q_prev, heads),
            q_now=(self.at("q", index), heads), tracked_rows=self._control("tracked", 1, rows),
            k_prev=(self.k_prev, (1, c.kv_heads, rows, c.head_size)), k_cache=(self.at("k", index), cache),
            key_mask=self._control("key_mask", 1, self.slots), sigma=self._result("sigma", 4 * index, 1),
        )  # fmt: skip

    def _probe(self, index: int, watch: Watch) -> None:
        c, slots, count = self.config, self.slots, self.capacity.track_num
        rows = self.capacity.rows if watch.window.max() < self.capacity.rows else slots
        self._run(
            "probe", REUSE if rows == self.capacity.rows else ANY,
            q_window=(self.at("q", index), (1, rows, c.heads, c.head_size)),
            window_rows=self._control("window", 1, rows), probe_keys=self._control("probe_keys", 1, slots),
            k_cache=(self.at("k", index), (1, c.kv_heads, slots, c.head_size)),
            key_mask=self._control("key_mask", 1, slots), probe=self._result("probe", 8 * index * count, 1, count),
        )  # fmt: skip

    def _head(self, rows: int) -> None:
        c = self.config
        self._run(
            "head", REUSE if rows == self.capacity.window else ANY,
            hidden=(self.at("h", c.layers), (1, self.slots, c.d_model)), rows=self._control("rows", 1, rows),
            token=self._result("token", 0, 1, rows), confidence=self._result("confidence", 0, 1, rows),
            logits=(self.logits_at, (1, rows, c.vocab)),
        )  # fmt: skip
