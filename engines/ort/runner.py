"""One sequence on the CPU: its caches as NumPy arrays, and what the sessions are bound to.

The caches are a session's inputs and outputs at once, so that ScatterND writes
them in place. Rows are written where their positions lie, so nothing has to be
moved: a move changes the table that says which row a slot stands for. Every slot
is a position, so nothing is masked. Layers leave the attention rows of tracked
tokens and of the window behind, and one run of the drift test looks at those of
all layers. Nothing here knows windows, gamma or text.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engines.config import layer_name
from engines.ort.workspace import BoundArray
from engines.runner import DriftInputs, Probes, ReuseResult, SequenceRunner, Slots

if TYPE_CHECKING:
    from engines.ort.model import OnnxRuntimeModel

NO_SLOTS: Slots = np.zeros(0, np.int64)
ONE: Slots = np.zeros(1, np.int64)  # reader at least: ONNX Runtime gives the maximum of no rows a wrong shape


class OnnxRuntimeRunner(SequenceRunner):
    """The caches of one sequence, in a workspace of the model; `limit` is the most it may be extended to."""

    def __init__(self, model: "OnnxRuntimeModel", length: int, limit: int, place: int):
        c = model.config
        super().__init__(c, length, slots=length)
        self.model, self.work, self.limit = model, model.workspace(place), limit
        self.h = self.work.take("h", c.layers + 1, limit, c.d_model).array
        self.planes = c.layers * (2 * c.kv_heads + c.heads)  # one a layer and head, of keys, values and queries
        self.work.take("kvq", self.planes, limit, c.head_size)
        self.given: NDArray[np.float32] | None = None
        self.ids: Slots | None = None  # of the first rows, which H of the first layer need not have yet
        self.entered = True
        self.said: tuple[Slots, Slots, NDArray[np.float32]] | None = None  # readers, tokens, confidences
        self.row_of, self.slot_at = np.arange(limit), np.arange(limit)  # a row is a position
        self.together = "reuse" in model.sessions
        self._bind()

    def grow(self, slots: Slots) -> None:
        length, size = self.length + len(slots), self.config.head_size
        assert np.array_equal(slots, np.arange(self.length, length)), "positions follow one another"
        wider, kept = (self.work.take("kvq", self.planes, n, size).array for n in (length, self.length))
        for plane in range(self.planes - 1, 0, -1):  # the last first: planes move up in the same memory
            wider[plane, : self.length] = kept[plane]
        self.length = self.slots = length
        self._bind()

    def _bind(self) -> None:
        """Bind what does not change until the sequence grows: the caches."""
        c, length = self.config, self.length
        self.track_num = self.work.put("track_num", np.array([min(self.model.capacity.track_num, length)]))
        planes = self.work.take("kvq", self.planes, length, c.head_size).array
        keys = c.layers * c.kv_heads
        self.k, self.v, self.q = (
            some.reshape(c.layers, 1, -1, length, c.head_size) for some in np.split(planes, [keys, 2 * keys])
        )
        self.work.bind(
            "attention", {"q_cache": BoundArray.of(self.q[:, 0]), "k_cache": BoundArray.of(self.k[:, 0])}, {}
        )
        self.work.bind("head", {"hidden": BoundArray.of(self.h[-1, None, :length])}, {})
        if self.together:
            entering = BoundArray.of(self.h[0, :length])
            self.work.bind("reuse", {"h_cache": entering}, {"h_cache_out": entering})
        for index in range(c.layers):
            caches = {"h": self.h[index + 1, :length], "q": self.q[index], "k": self.k[index], "v": self.v[index]}
            held = {name: BoundArray.of(cache) for name, cache in caches.items()}
            for part, suffix in ((layer_name(index), ""), ("reuse", f"_{index:02d}")):
                if part in self.model.sessions:
                    inputs = {f"{name}_cache{suffix}": cache for name, cache in held.items()}
                    outputs = {f"{name}_cache_out{suffix}": cache for name, cache in held.items()}
                    self.work.bind(part, inputs, outputs)

    def permute(self, target: Slots, source: Slots) -> None:
        self._enter()
        self.ids = self.said = None
        rows = self.row_of[source]
        self.row_of[target] = rows
        self.slot_at[rows] = target

    def set_input_embeddings(self, embeddings: NDArray[np.float32]) -> None:
        self.given = embeddings

    def embed(self, ids: Slots) -> None:
        self.ids, self.said, self.entered = ids, None, False

    def _enter(self) -> bool:
        """Embed what has not been yet; whether there was something, which then lies in `hidden_0` too."""
        if self.ids is None or self.entered:
            return False
        vocab, ids = self.config.vocab, self.ids
        known = ids if self.given is None else np.minimum(ids, vocab - 1)
        hidden = self.work.take("hidden_0", 1, len(ids), self.config.d_model)
        self.work.run("embed", {"ids": self.work.put("ids", known[None])}, {"hidden": hidden})
        if self.given is not None:
            images = np.flatnonzero(ids >= vocab)
            hidden.array[0, images] = self.given[ids[images] - vocab]
        self.h[0, self.row_of[: len(ids)]] = hidden.array[0]
        self.entered = True
        return True

    def layer(self, index: int, rows: int) -> None:
        self._run(rows, index, index + 1, NO_SLOTS, NO_SLOTS, np.arange(rows))

    def run_layers(
        self, rows: int, watch: DriftInputs | None, first: int = 0, logits_rows: Slots | None = None
    ) -> Probes:
        if watch is None:
            if first == 0 and rows < self.slots and self._known(rows):
                nobody = np.zeros(self.length, bool)
                self._run_together(
                    rows, DriftInputs("", NO_SLOTS, NO_SLOTS, nobody, ONE if logits_rows is None else logits_rows)
                )
            else:
                wanted = np.arange(rows) if logits_rows is None else logits_rows
                self._run(rows, first, self.config.layers, NO_SLOTS, NO_SLOTS, wanted)
            return []
        wanted = np.arange(rows) if logits_rows is None else np.union1d(watch.window, logits_rows)
        return self._probe(self._run(rows, first, self.config.layers, NO_SLOTS, watch.window, wanted)[1], watch)

    def _probe(self, attention: BoundArray, watch: DriftInputs) -> Probes:
        probe = self.work.take("probe", len(attention.array), int(self.track_num.array[0]), dtype=np.int64)
        inputs = {"window_attention": attention} | self._probed(watch.probe_keys)
        self.work.run("probe", inputs, {"probe": probe})
        slots: Slots = self.slot_at[probe.array]
        return slots

    def _probed(self, keys: NDArray[np.bool_]) -> dict[str, BoundArray]:
        """Which keys may be tracked, by row, and how many are."""
        return {"probe_keys": self.work.put("keys", keys[self.slot_at[: self.length]]), "track_num": self.track_num}

    def reuse(self, rows: int, watch: DriftInputs, gamma: float) -> ReuseResult:
        """All layers at once: that wastes at most a reuse pass, before a refresh that costs many."""
        c, work, tracked = self.config, self.work, watch.tracked
        before, sigma = work.take("before", c.layers, c.heads, len(tracked), self.length), work.take("sigma", c.layers)
        work.run("attention", {"tracked": work.put("tracked", self.row_of[tracked])}, {"attention_prev": before})
        if self._known(rows):
            attention, probes = self._run_together(rows, watch)
        else:
            attention, of_window = self._run(rows, 0, c.layers, tracked, watch.window, np.arange(rows))
            probes = self._probe(of_window, watch)
        work.run(f"drift_{watch.kind}", {"attention_prev": before, "attention": attention}, {"sigma": sigma})
        return ReuseResult.of(sigma.array.tolist(), probes, gamma)

    def _known(self, rows: int) -> bool:
        """Whether the graph of all parts will do: it begins with ids."""
        return self.together and self.given is None and self.ids is not None and len(self.ids) == rows

    def _places(self, rows: int) -> dict[str, BoundArray]:
        """Where the rows of the first `rows` slots are written: by position, and by head and position for queries,
        keys and values."""
        at = self.row_of[:rows]
        indices = self.work.take("indices", 1, self.config.heads, rows, 3, dtype=np.int64)
        indices.array[..., 0] = 0
        indices.array[..., 1] = np.arange(self.config.heads)[:, None]
        indices.array[..., 2] = at
        return {"positions": self.work.put("positions", at[None]), "indices": indices}

    def _run(
        self, rows: int, first: int, end: int, tracked: Slots, window: Slots, wanted: Slots
    ) -> tuple[BoundArray, BoundArray]:
        """Layers `first` … `end` - 1 on the first `rows` slots, the last layer for the `wanted` of them only; the
        attention [end - first, H, …, S] of the rows `tracked` and of the `window`."""
        c, work, last = self.config, self.work, self.config.layers - 1
        count, heads, length = end - first, c.heads, self.length
        attention, rows_of = work.planes("attention", count, heads, len(tracked), length)
        window_attention, window_of = work.planes("window_attention", count, heads, len(window), length)
        self.said = None
        hidden = work.take("hidden_0", 1, rows, c.d_model)
        if not (self._enter() and first == 0 and self.ids is not None and len(self.ids) == rows):
            hidden.array[0] = self.h[first].take(self.row_of[:rows], axis=0)
        inputs = self._places(rows)
        inputs |= {"tracked_rows": work.put("tracked_rows", tracked), "window_rows": work.put("window_rows", window)}
        for index in range(first, end):  # all are bound before any is run: while a layer runs, Python's code grows cold
            inputs["hidden"] = hidden
            hidden = work.take(f"hidden_{(index + 1 - first) % 2}", 1, rows, c.d_model)
            if index == last:
                hidden = work.take("left", 1, len(wanted), c.d_model)
                inputs["output_rows"] = work.put("output_rows", wanted)
                for name, some in (("tracked_rows", tracked), ("window_rows", window)):
                    inputs[name] = work.put(f"wanted_{name}", np.searchsorted(wanted, some))
            seen = {"attention": rows_of[index - first], "window_attention": window_of[index - first]}
            work.bind(layer_name(index), inputs, seen | {"hidden_out": hidden})
        for index in range(first, end):
            work.run(layer_name(index), {}, {})
        return attention, window_attention

    def _run_together(self, rows: int, watch: DriftInputs) -> tuple[BoundArray, Probes]:
        """All parts on the first `rows` slots; the attention [L, H, T, S] of the tracked rows, and the probes."""
        c, work = self.config, self.work
        assert self.ids is not None
        counted = work.take("counted", rows)
        counted.array[...] = 0
        counted.array[watch.window] = 1
        inputs = self._places(rows) | self._probed(watch.probe_keys)
        inputs |= {
            "ids": work.put("ids", self.ids[None]), "tracked_rows": work.put("tracked_rows", watch.tracked),
            "window_rows": counted, "logits_rows": work.put("logits_rows", watch.logits_rows),
        }  # fmt: skip
        attention = work.take("attention", c.layers, c.heads, len(watch.tracked), self.length)
        probe = work.take("probe", c.layers, int(self.track_num.array[0]), dtype=np.int64)
        outputs = self._predicted(len(watch.logits_rows))
        work.run("reuse", inputs, outputs | {"attention": attention, "probe": probe})
        self.entered, self.said = True, (watch.logits_rows, *self._read(outputs))
        return attention, self.slot_at[probe.array]

    def _predicted(self, count: int) -> dict[str, BoundArray]:
        token, confidence = self.work.take("token", 1, count, dtype=np.int64), self.work.take("confidence", 1, count)
        return {"token": token, "confidence": confidence}

    def _read(self, outputs: dict[str, BoundArray]) -> tuple[Slots, NDArray[np.float32]]:
        return outputs["token"].array[0].copy(), outputs["confidence"].array[0].copy()

    def head(self, rows: Slots) -> tuple[Slots, NDArray[np.float32]]:
        if self.said is not None and self.said[0].tobytes() == rows.tobytes():
            return self.said[1:]
        outputs = self._predicted(len(rows))
        self.work.run("head", {"rows": self.work.put("rows", self.row_of[rows][None])}, outputs)
        return self._read(outputs)

    def logits(self, rows: Slots) -> NDArray[np.float32]:
        hidden = self.h[-1, None, : self.length]
        (logits,) = self.model.run("head", ["logits"], hidden=hidden, rows=self.row_of[rows][None])
        return np.asarray(logits[0])

    def hidden(self, index: int, rows: int) -> NDArray[np.float32]:
        self._enter()
        found: NDArray[np.float32] = self.h[index].take(self.row_of[:rows], axis=0)
        return found

    def set_hidden(self, index: int, hidden: NDArray[np.float32]) -> None:
        self._enter()
        self.ids = self.said = None
        self.h[index, self.row_of[: len(hidden)]] = hidden
