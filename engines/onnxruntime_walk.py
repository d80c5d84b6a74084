"""One sequence on the CPU: its caches as NumPy arrays, and what every layer's session is bound to.

The caches are a layer's inputs and outputs at once, so that TensorScatter writes
them in place; hidden states go straight from one layer's rows of H to the next.
Every slot is a position, so nothing is masked. Layers leave the attention rows of
tracked tokens and of the window behind, and one run of the drift test looks at
those of all layers. Nothing here knows windows, gamma or text.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.config import layer_name
from engines.session import Reuse, Slots, Walk, Watch

if TYPE_CHECKING:
    from engines.onnxruntime import OnnxRuntimeModel

NONE: Slots = np.zeros(0, np.int64)
GRAIN = 8  # watched rows are rounded up to a multiple, so that few steps need more of them than any before


class OnnxRuntimeWalk(Walk):
    """The caches of one sequence, in the model's memory; `limit` is the most it may be extended to."""

    def __init__(self, model: "OnnxRuntimeModel", length: int, limit: int, place: int):
        c = model.config
        super().__init__(c, length, slots=length)
        self.model, self.space = model, partial(model.space, place)
        # A cache is planes of slots; K and V lie side by side, so that a row moves through both at once.
        self.planes = {"h": c.layers + 1, "q": c.layers, "kv": 2 * c.layers * c.kv_heads}
        self.width = {"h": c.d_model, "q": c.heads * c.head_size, "kv": c.head_size}
        for name, planes in self.planes.items():
            self.space(name, planes, limit, self.width[name])
        for name in ("attention", "before"):
            self.space(name, c.layers, c.heads, model.capacity.rows, limit)
        self.given: NDArray[np.float32] | None = None
        self.positions = np.arange(length)[None, None]
        self.write_index = np.zeros(1, np.int64)
        self.recall = model.sessions["recall"].io_binding()
        self._bind()

    def extend(self, slots: Slots) -> None:
        length = self.length + len(slots)
        assert np.array_equal(slots, np.arange(self.length, length)), "positions follow one another"
        for name, cache in self.caches.items():
            wider = self.space(name, self.planes[name], length, self.width[name])
            for plane in range(self.planes[name] - 1, 0, -1):  # the last first: planes move up in the same memory
                wider[plane, : self.length] = cache[plane]
        self.positions = np.concatenate([self.positions, slots[None, None]], axis=2)
        self.length = self.slots = length
        self._bind()

    def _bind(self) -> None:
        """Lay the caches out for the length and bind what does not change until the next: them, and where rows go."""
        c, length = self.config, self.length
        self.caches = {n: self.space(n, planes, length, self.width[n]) for n, planes in self.planes.items()}
        self.h = self.caches["h"].reshape(c.layers + 1, 1, length, c.d_model)
        self.q = self.caches["q"].reshape(c.layers, 1, length, c.heads, c.head_size)
        self.k, self.v = self.caches["kv"].reshape(2, c.layers, 1, c.kv_heads, length, c.head_size)
        self.values: dict[tuple[str, int], list[ort.OrtValue]] = {}
        self.recall.bind_ortvalue_input("k_cache", value(self.k[:, 0]))
        self.bindings = [layer.io_binding() for layer in self.model.layers]
        for index, binding in enumerate(self.bindings):
            binding.bind_ortvalue_input("write_index", value(self.write_index))
            for name, cache in (("k_cache", value(self.k[index])), ("v_cache", value(self.v[index]))):
                binding.bind_ortvalue_input(name, cache)
                binding.bind_ortvalue_output(f"{name}_out", cache)
        self.track_num = np.array([min(self.model.capacity.track_num, length)])
        self.bound = [0] * c.layers  # rows that each layer's bindings have
        self._bind_watched(0)

    def watch(self, *rows: Slots) -> None:
        """Have the layers leave the attention of these rows in the first rows of `attention` [L, H, N, S]."""
        count = sum(map(len, rows))
        if count > len(self.watched) or (count == 0 and len(self.watched)):
            self._bind_watched(-(-count // GRAIN) * GRAIN)
        self.watched[:count] = np.concatenate(rows)
        self.watched[count:] = 0  # any row that is run does

    def _bind_watched(self, count: int) -> None:
        """Room for `count` rows, which stays the same from step to step: what is bound need not be bound again."""
        self.watched = np.zeros(count, np.int64)
        self.attention = self._rows("attention", count)
        watched = value(self.watched)
        for binding, plane in zip(self.bindings, self.attention, strict=True):
            binding.bind_ortvalue_input("watched", watched)
            binding.bind_ortvalue_output("attention", value(plane[None]))

    def _rows(self, name: str, count: int) -> NDArray[np.float32]:
        """Memory for `count` attention rows of each layer and head."""
        return self.space(name, self.config.layers, self.config.heads, count, self.length)

    def _first(self, name: str, rows: int) -> list[ort.OrtValue]:
        """The first rows of a cache, one value a layer; made once, for that takes as long as a small operator."""
        if (name, rows) not in self.values:
            self.values[name, rows] = [value(plane[:, :rows]) for plane in getattr(self, name)]
        return self.values[name, rows]

    def move(self, target: Slots, source: Slots) -> None:
        if len(target):
            for cache in (*self.caches.values(), self.positions[0]):
                cache[:, target] = cache[:, source]

    def give(self, embeddings: NDArray[np.float32]) -> None:
        self.given = embeddings

    def embed(self, ids: Slots) -> None:
        vocab = self.config.vocab
        known = ids if self.given is None else np.minimum(ids, vocab - 1)
        (self.h[0, :, : len(ids)],) = self.model.run("embed", ["hidden"], ids=known[None])
        if self.given is not None:
            rows = np.flatnonzero(ids >= vocab)
            self.h[0, 0, rows] = self.given[ids[rows] - vocab]

    def layer(self, index: int, rows: int) -> None:
        binding = self.bindings[index]
        if self.bound[index] != rows:
            hidden = self._first("h", rows)
            binding.bind_ortvalue_input("hidden", hidden[index])
            binding.bind_ortvalue_input("positions", self._first("positions", rows)[0])
            binding.bind_ortvalue_output("hidden_out", hidden[index + 1])
            binding.bind_ortvalue_output("q", self._first("q", rows)[index])
            self.bound[index] = rows
        self.model.run_bound(layer_name(index), binding)

    def whole(self, rows: int, watch: Watch | None, first: int = 0) -> list[Slots]:
        self.watch(NONE if watch is None else watch.window)
        for index in range(first, self.config.layers):
            self.layer(index, rows)
        if watch is None:
            return []
        (probes,) = self.model.run("probe", ["probe"], **self._seen(watch, first, tracked=0))
        return list(probes)

    def reuse(self, rows: int, watch: Watch, gamma: float) -> Reuse:
        """All layers at once: that wastes at most a reuse pass, before a refresh that costs many."""
        before = self._rows("before", len(watch.tracked))
        self.recall.bind_ortvalue_input("q_prev", value(np.ascontiguousarray(self.q[:, 0, watch.tracked])))
        self.recall.bind_ortvalue_output("before", value(before))
        self.model.run_bound("recall", self.recall)
        self.watch(watch.tracked, watch.window)
        for index in range(self.config.layers):
            self.layer(index, rows)
        sigma, probes = self.model.run(
            f"drift_{watch.kind}", ["sigma", "probe"], before=before, **self._seen(watch, 0, len(watch.tracked))
        )
        return Reuse.of(sigma.tolist(), list(probes), gamma)

    def _seen(self, watch: Watch, first: int, tracked: int) -> dict[str, Any]:
        """What the layers from `first` on have left for the drift test and the probe: the window's rows count."""
        window = np.zeros(len(self.watched), bool)
        window[tracked : tracked + len(watch.window)] = True
        return {
            "attention": self.attention[first:], "window_rows": window,
            "probe_keys": watch.probe_keys, "track_num": self.track_num,
        }  # fmt: skip

    def head(self, rows: Slots) -> tuple[Slots, NDArray[np.float32]]:
        token, confidence = self.model.run("head", ["token", "confidence"], hidden=self.h[-1], rows=rows[None])
        return token[0], confidence[0]

    def logits(self, rows: Slots) -> NDArray[np.float32]:
        return np.asarray(self.model.run("head", ["logits"], hidden=self.h[-1], rows=rows[None])[0][0])

    def hidden(self, index: int, rows: int) -> NDArray[np.float32]:
        return self.h[index, 0, :rows].copy()

    def set_hidden(self, index: int, hidden: NDArray[np.float32]) -> None:
        self.h[index, 0, : len(hidden)] = hidden


def value(array: NDArray[Any]) -> ort.OrtValue:
    """The memory of a contiguous array, not a copy; it holds on to the array."""
    assert array.flags.c_contiguous
    return ort.OrtValue.ortvalue_from_numpy(array)
