"""One sequence on the CPU: its caches are NumPy arrays that the sessions read and write.

A cache is an input and an output of a session at once, so that ScatterND writes
it in place. Rows are written where their positions are, so no memory moves: a
permutation of slots changes the table from slots to rows. Every slot is a
position, so no key is masked. Layers return the attention rows of the tracked
tokens and of the window, and one run of the drift test reads those of all layers.
"""

import numpy as np
from numpy.typing import NDArray

from engines.config import Capacity, ModelConfig, layer_name
from engines.ort.prefix import PrefixRows
from engines.ort.workspace import BoundArray, Workspace
from engines.runner import DriftInputs, Probes, ReuseResult, SequenceRunner, Slots

NO_SLOTS: Slots = np.zeros(0, np.int64)
ONE_SLOT: Slots = np.zeros(1, np.int64)  # the least logits rows: ONNX Runtime's maximum of no rows has a wrong shape


class OnnxRuntimeRunner(PrefixRows, SequenceRunner):
    """The caches of one sequence of `length` positions, which may grow to `limit`, in a workspace."""

    def __init__(self, config: ModelConfig, capacity: Capacity, workspace: Workspace, length: int, limit: int):
        super().__init__(config, length, slots=length)
        self.work, self.most_tracked = workspace, capacity.track_num
        # [L + 1, limit, d]
        self.h = workspace.take("h", config.layers + 1, limit, config.d_model).array
        self.planes = config.layers * (2 * config.kv_heads + config.heads)  # keys, values, queries: layers and heads
        workspace.take("kvq", self.planes, limit, config.head_size)
        self.embeddings: NDArray[np.float32] | None = None  # [n, d]
        self.ids: Slots | None = None  # [A] of the first slots, if these have entered no layer but the first
        self.embedded = True  # whether H of the first layer holds the embeddings of `ids`
        # Of the last run of the reuse graph: logits rows, tokens and confidences, [W] each.
        self.prediction: tuple[Slots, Slots, NDArray[np.float32]] | None = None
        self.row_of, self.slot_at = np.arange(limit), np.arange(limit)  # slot -> row of the caches, and back
        self.has_reuse_graph = "reuse" in workspace.sessions
        self._bind_caches()

    def grow(self, slots: Slots) -> None:
        length, size = self.length + len(slots), self.config.head_size
        assert np.array_equal(slots, np.arange(self.length, length)), "positions follow one another"
        wider, old = (self.work.take("kvq", self.planes, n, size).array for n in (length, self.length))
        for plane in range(self.planes - 1, 0, -1):  # from the last: planes move up within the same memory
            wider[plane, : self.length] = old[plane]
        self.length = self.slots = length
        self._bind_caches()

    def _bind_caches(self) -> None:
        """Bind what stays the same until the sequence grows."""
        c, length, work = self.config, self.length, self.work
        self.track_num = work.put("track_num", np.array([min(self.most_tracked, length)]))
        planes = work.take("kvq", self.planes, length, c.head_size).array
        keys = c.layers * c.kv_heads
        # k, v [L, 1, G, S, D]; q [L, 1, H, S, D]
        self.k, self.v, self.q = (
            some.reshape(c.layers, 1, -1, length, c.head_size) for some in np.split(planes, [keys, 2 * keys])
        )
        work.bind("attention", {"q_cache": BoundArray.of(self.q[:, 0]), "k_cache": BoundArray.of(self.k[:, 0])}, {})
        work.bind("head", {"hidden": BoundArray.of(self.h[-1, None, :length])}, {})
        if self.has_reuse_graph:
            first = BoundArray.of(self.h[0, :length])
            work.bind("reuse", {"h_cache": first}, {"h_cache_out": first})
        for index in range(c.layers):
            caches = {"h": self.h[index + 1, :length], "q": self.q[index], "k": self.k[index], "v": self.v[index]}
            values = {name: BoundArray.of(cache) for name, cache in caches.items()}
            for part, suffix in ((layer_name(index), ""), ("reuse", f"_{index:02d}")):
                if part in work.sessions:
                    inputs = {f"{name}_cache{suffix}": value for name, value in values.items()}
                    outputs = {f"{name}_cache_out{suffix}": value for name, value in values.items()}
                    work.bind(part, inputs, outputs)

    def permute(self, target: Slots, source: Slots) -> None:
        self._embed_pending()
        self.ids = self.prediction = None
        rows = self.row_of[source]
        self.row_of[target] = rows
        self.slot_at[rows] = target

    def set_input_embeddings(self, embeddings: NDArray[np.float32]) -> None:
        self.embeddings = embeddings

    def embed(self, ids: Slots) -> None:
        self.ids, self.prediction, self.embedded = ids, None, False

    def _embed_pending(self) -> bool:
        """Embed `ids` if still pending. Returns True if this call did; `hidden_0` then holds them [1, A, d]."""
        if self.ids is None or self.embedded:
            return False
        vocab, ids = self.config.vocab, self.ids
        known = ids if self.embeddings is None else np.minimum(ids, vocab - 1)
        hidden = self.work.take("hidden_0", 1, len(ids), self.config.d_model)
        self.work.run("embed", {"ids": self.work.put("ids", known[None])}, {"hidden": hidden})
        if self.embeddings is not None:
            images = np.flatnonzero(ids >= vocab)
            hidden.array[0, images] = self.embeddings[ids[images] - vocab]
        self.h[0, self.row_of[: len(ids)]] = hidden.array[0]
        self.embedded = True
        return True

    def layer(self, index: int, rows: int) -> None:
        self._run(rows, index, index + 1, NO_SLOTS, NO_SLOTS, np.arange(rows))

    def run_layers(
        self, rows: int, drift_inputs: DriftInputs | None, first: int = 0, logits_rows: Slots | None = None
    ) -> Probes:
        if drift_inputs is not None:
            output_rows = np.arange(rows) if logits_rows is None else np.union1d(drift_inputs.window, logits_rows)
            _, attention = self._run(rows, first, self.config.layers, NO_SLOTS, drift_inputs.window, output_rows)
            return self._probe(attention, drift_inputs)
        if first == 0 and rows < self.slots and self._reuse_graph_fits(rows):
            predicted = ONE_SLOT if logits_rows is None else logits_rows
            self._run_reuse_graph(rows, DriftInputs("", NO_SLOTS, NO_SLOTS, np.zeros(self.length, bool), predicted))
        else:
            output_rows = np.arange(rows) if logits_rows is None else logits_rows
            self._run(rows, first, self.config.layers, NO_SLOTS, NO_SLOTS, output_rows)
        return []

    def _probe(self, attention: BoundArray, drift_inputs: DriftInputs) -> Probes:
        """The tracked slots of each layer from the window's attention rows."""
        probe = self.work.take("probe", len(attention.array), int(self.track_num.array[0]), dtype=np.int64)
        inputs = {"window_attention": attention} | self._probe_inputs(drift_inputs.probe_keys)
        self.work.run("probe", inputs, {"probe": probe})
        slots: Slots = self.slot_at[probe.array]
        return slots

    def _probe_inputs(self, keys: NDArray[np.bool_]) -> dict[str, BoundArray]:
        """The probe's inputs: `keys` [slots] reordered from slots to cache rows, and K as `track_num` [1]."""
        return {"probe_keys": self.work.put("keys", keys[self.slot_at[: self.length]]), "track_num": self.track_num}

    def reuse(self, rows: int, drift_inputs: DriftInputs, gamma: float) -> ReuseResult:
        """See `SequenceRunner.reuse`. All layers run.

        Those after the trigger run in vain, which costs little beside the refresh.
        """
        c, work, tracked = self.config, self.work, drift_inputs.tracked
        previous = work.take("attention_prev", c.layers, c.heads, len(tracked), self.length)
        sigma = work.take("sigma", c.layers)
        work.run("attention", {"tracked": work.put("tracked", self.row_of[tracked])}, {"attention_prev": previous})
        if self._reuse_graph_fits(rows):
            attention, probes = self._run_reuse_graph(rows, drift_inputs)
        else:
            attention, of_window = self._run(rows, 0, c.layers, tracked, drift_inputs.window, np.arange(rows))
            probes = self._probe(of_window, drift_inputs)
        work.run(f"drift_{drift_inputs.kind}", {"attention_prev": previous, "attention": attention}, {"sigma": sigma})
        return ReuseResult.of(sigma.array.tolist(), probes, gamma)

    def _reuse_graph_fits(self, rows: int) -> bool:
        """Whether the reuse graph can run these rows: its inputs are their ids."""
        return self.has_reuse_graph and self.embeddings is None and self.ids is not None and len(self.ids) == rows

    def _row_inputs(self, rows: int) -> dict[str, BoundArray]:
        """Where the first `rows` slots are written: positions [1, A], and indices [1, H, A, 3] of the caches.

        Where attention is block-causal, also the ends [A] of the rows' blocks.
        """
        at = self.row_of[:rows]
        indices = self.work.take("indices", 1, self.config.heads, rows, 3, dtype=np.int64)
        indices.array[..., 0] = 0
        indices.array[..., 1] = np.arange(self.config.heads)[:, None]
        indices.array[..., 2] = at
        found = {"positions": self.work.put("positions", at[None]), "indices": indices}
        if self.block_length:
            found["block_ends"] = self.work.put("block_ends", (at // self.block_length + 1) * self.block_length)
        return found

    def _run(
        self, rows: int, first: int, end: int, tracked: Slots, window: Slots, output_rows: Slots
    ) -> tuple[BoundArray, BoundArray]:
        """Run layers `first` … `end` - 1 over the first `rows` slots, the model's last layer for `output_rows` only.

        Returns the attention [end - first, H, T or W, S] of the rows `tracked` and of the `window`.
        """
        c, work, last = self.config, self.work, self.config.layers - 1
        count, heads, length = end - first, c.heads, self.length
        attention, rows_of = work.planes("attention", count, heads, len(tracked), length)
        window_attention, window_of = work.planes("window_attention", count, heads, len(window), length)
        self.prediction = None
        hidden = work.take("hidden_0", 1, rows, c.d_model)
        if not (self._embed_pending() and first == 0 and self.ids is not None and len(self.ids) == rows):
            hidden.array[0] = self.h[first].take(self.row_of[:rows], axis=0)
        inputs = self._row_inputs(rows)
        inputs |= {"tracked_rows": work.put("tracked_rows", tracked), "window_rows": work.put("window_rows", window)}
        # All layers are bound before any is run: running a layer evicts the interpreter's code from the CPU caches,
        # which slows binding.
        for index in range(first, end):
            inputs["hidden"] = hidden
            hidden = work.take(f"hidden_{(index + 1 - first) % 2}", 1, rows, c.d_model)
            if index == last:
                hidden = work.take("output", 1, len(output_rows), c.d_model)
                inputs["output_rows"] = work.put("output_rows", output_rows)
                for name, some in (("tracked_rows", tracked), ("window_rows", window)):
                    inputs[name] = work.put(f"output_{name}", np.searchsorted(output_rows, some))
            seen = {"attention": rows_of[index - first], "window_attention": window_of[index - first]}
            work.bind(layer_name(index), inputs, seen | {"hidden_out": hidden})
        for index in range(first, end):
            work.run(layer_name(index), {}, {})
        return attention, window_attention

    def _run_reuse_graph(self, rows: int, drift_inputs: DriftInputs) -> tuple[BoundArray, Probes]:
        """Run the reuse graph over the first `rows` slots; the tracked rows' attention [L, H, T, S], and the probes."""
        c, work = self.config, self.work
        assert self.ids is not None
        counted = work.take("counted", rows)
        counted.array[...] = 0
        counted.array[drift_inputs.window] = 1
        inputs = self._row_inputs(rows) | self._probe_inputs(drift_inputs.probe_keys)
        inputs |= {
            "ids": work.put("ids", self.ids[None]), "tracked_rows": work.put("tracked_rows", drift_inputs.tracked),
            "window_rows": counted, "logits_rows": work.put("logits_rows", drift_inputs.logits_rows),
        }  # fmt: skip
        attention = work.take("attention", c.layers, c.heads, len(drift_inputs.tracked), self.length)
        probe = work.take("probe", c.layers, int(self.track_num.array[0]), dtype=np.int64)
        outputs = self._head_outputs(len(drift_inputs.logits_rows))
        work.run("reuse", inputs, outputs | {"attention": attention, "probe": probe})
        self.embedded, self.prediction = True, (drift_inputs.logits_rows, *_copied(outputs))
        return attention, self.slot_at[probe.array]

    def _head_outputs(self, count: int) -> dict[str, BoundArray]:
        token, confidence = self.work.take("token", 1, count, dtype=np.int64), self.work.take("confidence", 1, count)
        return {"token": token, "confidence": confidence}

    def head(self, rows: Slots) -> tuple[Slots, NDArray[np.float32]]:
        if self.prediction is not None and self.prediction[0].tobytes() == rows.tobytes():
            return self.prediction[1:]
        outputs = self._head_outputs(len(rows))
        self.work.run("head", {"rows": self.work.put("rows", self.row_of[rows][None])}, outputs)
        return _copied(outputs)

    def logits(self, rows: Slots) -> NDArray[np.float32]:
        hidden = self.h[-1, None, : self.length]
        (logits,) = self.work.sessions.run("head", ["logits"], hidden=hidden, rows=self.row_of[rows][None])
        return np.asarray(logits[0])

    def hidden(self, index: int, rows: int) -> NDArray[np.float32]:
        self._embed_pending()
        found: NDArray[np.float32] = self.h[index].take(self.row_of[:rows], axis=0)
        return found

    def set_hidden(self, index: int, hidden: NDArray[np.float32]) -> None:
        self._embed_pending()
        self.ids = self.prediction = None
        self.h[index, self.row_of[: len(hidden)]] = hidden


def _copied(outputs: dict[str, BoundArray]) -> tuple[Slots, NDArray[np.float32]]:
    """Copies of token (int64) and confidence (float32), [W]; the next run overwrites the originals."""
    return outputs["token"].array[0].copy(), outputs["confidence"].array[0].copy()
