"""One sequence on a GPU: what engines are told about it, and what they say.

Where its engines can be captured, a reuse pass always runs `capacity.rows` rows,
the missing ones filled with dummies, so that shapes and addresses never change:
embed, all layers with their drift tests and probes, and the head are captured
once and launched once a step. Either way the host waits once, at the end. The
sequence's memory is one place of `engines.gpu.cache`. Nothing here knows a
back end, windows, gamma, text, or the other sequences of a batch.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.gpu.buffers import InputEmbeddings, StagingBuffer, narrow, widen
from engines.gpu.cache import Caches
from engines.gpu.passes import PassQueue, control_buffer, result_buffer
from engines.runner import DriftInputs, LayerwiseRunner, Probes, ReusePass, ReuseResult, Slots

if TYPE_CHECKING:
    from engines.gpu.model import GpuModel


NO_SLOTS: Slots = np.zeros(0, np.int64)


class GpuRunner(LayerwiseRunner):
    """A sequence at a place of the caches, which nothing may write over until `idle`."""

    def __init__(self, model: "GpuModel", caches: Caches, batch_row: int):
        config, capacity, slots = model.config, model.capacity, caches.slots
        super().__init__(config, slots - capacity.rows, slots, padded_rows=capacity.rows if model.capturable else 0)
        self.optimistic = True
        self.cuda, self.capacity, self.caches = model.cuda, capacity, caches
        self.precision = model.bundle.manifest.precision
        widths = dict.fromkeys(("ids", "positions", "key_mask", "probe_keys", "tracked", "window"), slots)
        self.control = control_buffer(self.cuda, 1, widths | {"rows": capacity.rows, "write_index": 1})
        self.result = result_buffer(self.cuda, 1, config.layers, capacity.track_num, capacity.rows)
        self.parts = PassQueue(model, caches, self.control, self.result, batch_row)
        self.given: InputEmbeddings | None = None
        self.start(1)  # so that its numbers are numbers before a sequence is there
        self.end()

    @property
    def batch_row(self) -> int:
        return self.parts.first

    @batch_row.setter
    def batch_row(self, batch_row: int) -> None:
        self.parts.first = batch_row

    def start(self, length: int) -> None:
        """Begin a sequence: position p in slot p; slots from `length` on are dummies, masked as keys."""
        self.length, self.idle = length, False
        self.control.edit()
        self.control["positions"][:] = np.minimum(np.arange(self.slots), self.config.max_length - 1)
        self.control["key_mask"][:] = np.arange(self.slots) < length
        self.unembedded = NO_SLOTS  # ids that wait to be embedded
        self.predicted: dict[int, tuple[int, np.float32]] = {}  # by slot: what the head said, while that holds

    def end(self) -> None:
        self.idle = True
        if self.given is not None:
            self.given.free()
            self.given = None

    def set_input_embeddings(self, embeddings: NDArray[np.float32]) -> None:
        self.given = InputEmbeddings(self.cuda, embeddings, self.precision)

    def grow(self, slots: Slots) -> None:
        self.length += len(slots)
        self.control.edit()
        self.control["key_mask"][slots] = True

    def permute(self, target: Slots, source: Slots) -> None:
        if not len(target):
            return
        self.control.edit()
        for name in ("positions", "key_mask"):
            self.control[name][target] = self.control[name][source]
        self.predicted = {}
        self.caches.permute(self.batch_row, target, source)

    def relocate(self, batch_row: int) -> None:
        """Go on at another place, whose sequence is over."""
        self.caches.relocate(batch_row, self.batch_row)
        self.batch_row = batch_row

    def embed(self, ids: Slots) -> None:
        self.control.edit()
        self.control["ids"][: len(ids)] = np.minimum(ids, self.config.vocab - 1)
        self.unembedded = ids

    def layer(self, index: int, rows: int) -> None:
        self._prepare()
        self.predicted = {}
        self.parts.layer(index, rows)

    def save_previous(self, index: int, rows: int, watch: DriftInputs) -> Any:
        self._prepare(watch)
        self.parts.save_previous(index, rows)
        return rows

    def drift(self, index: int, before: Any, watch: DriftInputs) -> float:
        self._prepare(watch)
        self.parts.drift(index, before, watch.kind)
        return float(self.result.fetch()["sigma"][index])

    def probe(self, index: int, watch: DriftInputs) -> Slots:
        self._prepare(watch)
        self.parts.probe(index, self._probed(watch))
        return np.array(self._probes(self.result.fetch())[index])

    def run_layers(
        self, rows: int, watch: DriftInputs | None, first: int = 0, logits_rows: Slots | None = None
    ) -> Probes:
        self._prepare(watch)
        self.predicted = {}
        for index in range(first, self.config.layers):
            self.parts.layer(index, rows)
            if watch is not None:
                self.parts.probe(index, self._probed(watch))
        return [] if watch is None else list(self._probes(self.result.fetch())[first:].copy())

    def reuse(self, rows: int, watch: DriftInputs, gamma: float) -> ReuseResult:
        due = ReusePass(self, rows, watch, gamma)
        if not self.ahead(due):
            return super().reuse(rows, watch, gamma)
        self.queue(due)
        self.cuda.sync()
        return self.collect(due)

    def ahead(self, due: ReusePass) -> bool:
        """Whether a pass may run to its end before anything is looked at."""
        return self.optimistic and len(due.watch.window) <= self.capacity.window

    def captured(self, due: ReusePass) -> bool:
        """Whether a pass is the one that is captured: of the fixed rows, with the window among them."""
        return self.ahead(due) and due.rows == self.padded_rows == self._probed(due.watch)

    def set_targets(self, watch: DriftInputs) -> None:
        """Note what the coming pass looks at."""
        self._point_head(watch.logits_rows)
        self._look(watch)

    def queue(self, due: ReusePass) -> None:
        """Queue a whole reuse pass and the copy of its results, which are there after the next wait."""
        self.set_targets(due.watch)
        embeds = self.given is None  # given rows come between the embedding and the layers, each time others
        if embeds:
            self.control.send()
        else:
            self._prepare()
        kind, probed = due.watch.kind, self._probed(due.watch)
        if self.captured(due):
            self.parts.replay((kind, self.batch_row, embeds), lambda: self.parts.reuse(due.rows, kind, probed, embeds))
        else:
            self.parts.reuse(due.rows, kind, probed, embeds)
        self.result.ask()

    def collect(self, due: ReusePass) -> ReuseResult:
        """The outcome of the pass that was queued."""
        result = self.result
        return self.record(due, result["sigma"], self._probes(result), result["token"], result["confidence"])

    def record(
        self, due: ReusePass, sigma: NDArray[np.float32], probe: Slots, token: Slots, confidence: NDArray[np.float32]
    ) -> ReuseResult:
        """A pass has run to its end, and embedded what it needs: sigma [L], probe [L, K], and what the head said."""
        self.unembedded = NO_SLOTS
        said = zip(token.tolist(), confidence.copy(), strict=True)
        self.predicted = dict(zip(due.watch.logits_rows.tolist(), said, strict=False))
        return ReuseResult.of(sigma.tolist(), list(probe.copy()), due.gamma)

    def head(self, rows: Slots) -> tuple[Slots, NDArray[np.float32]]:
        if self.predicted.keys() >= set(rows.tolist()):
            tokens, confidences = zip(*(self.predicted[slot] for slot in rows.tolist()), strict=True)
            return np.array(tokens), np.array(confidences)
        chunks = [(r["token"][: len(c)].copy(), r["confidence"][: len(c)].copy()) for c, r in self._heads(rows)]
        token, confidence = map(np.concatenate, zip(*chunks, strict=True))
        return token, confidence

    def logits(self, rows: Slots) -> NDArray[np.float32]:
        chunks = []
        for chunk, _ in self._heads(rows):
            logits = np.empty((len(chunk), self.config.vocab), np.float32)
            self.cuda.download(logits, self.caches.logits)
            self.cuda.sync()
            chunks.append(logits)
        return np.concatenate(chunks)

    def _heads(self, rows: Slots) -> Iterator[tuple[Slots, StagingBuffer]]:
        """Run the head chunk by chunk; yields each chunk and the results, which hold until the next."""
        step = self.capacity.window if len(rows) <= self.capacity.window else self.capacity.rows
        for start in range(0, len(rows), step):
            chunk = rows[start : start + step]
            self._point_head(chunk)
            self._prepare()
            self.parts.head(step)
            yield chunk, self.result.fetch()

    def hidden(self, index: int, rows: int) -> NDArray[np.float32]:
        self._prepare()
        raw = np.empty((rows, self.caches.width["h"]), np.uint8)
        self.cuda.download(raw, self.caches.at("h", index, self.batch_row))
        self.cuda.sync()
        return widen(raw, self.precision)

    def set_hidden(self, index: int, hidden: NDArray[np.float32]) -> None:
        self._prepare()
        raw = narrow(hidden, self.precision)
        self.cuda.upload(self.caches.at("h", index, self.batch_row), raw)
        self.cuda.sync()
        self.predicted = {}

    def _prepare(self, watch: DriftInputs | None = None) -> None:
        """Send the control block if it changed, and embed what waits for it."""
        if watch is not None:
            self._look(watch)
        self.control.send()
        if len(self.unembedded):
            self.parts.embed(len(self.unembedded))
            if self.given is not None:
                self.given.batch_row(self.caches.at("h", 0, self.batch_row), self.unembedded - self.config.vocab)
            self.unembedded = NO_SLOTS

    def _look(self, watch: DriftInputs) -> None:
        """Write what the drift test and the probe look at, if it changed."""
        wanted = {"probe_keys": watch.probe_keys}
        for name, slots in (("tracked", watch.tracked), ("window", watch.window)):
            wanted[name] = np.zeros(self.slots, bool)
            wanted[name][slots] = True
        if any(not np.array_equal(self.control[name], value) for name, value in wanted.items()):
            self.control.edit()
            for name, value in wanted.items():
                self.control[name][:] = value

    def _point_head(self, rows: Slots) -> None:
        self.control.edit()
        self.control["rows"][:] = 0
        self.control["rows"][: len(rows)] = rows

    def _probed(self, watch: DriftInputs) -> int:
        """How many rows the probe looks at: the first few, unless the window lies beyond them."""
        return self.capacity.rows if watch.window.max() < self.capacity.rows else self.slots

    def _probes(self, result: StagingBuffer) -> Slots:
        """The tracked slots [L, K] as a result has them."""
        return result["probe"].reshape(self.config.layers, -1)
