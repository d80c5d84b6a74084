"""One sequence on a GPU: a batch row of the caches, the inputs that steer its passes, and their results.

Where engines can be captured, a reuse pass always runs `capacity.rows` rows, padded with dummies, so that shapes and
addresses never change: embed, all layers with their drift tests and probes, and the head are captured as one CUDA
graph, which is launched once a step. Captured or not, the host waits once, at the end of the pass.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.gpu.buffers import InputEmbeddings, narrow, widen
from engines.gpu.cache import DeviceCaches
from engines.gpu.executor import Executor
from engines.gpu.passes import PassQueue
from engines.gpu.prefix import PrefixRows
from engines.gpu.staging import ControlBuffer, ResultBuffer
from engines.runner import DriftInputs, LayerwiseRunner, Probes, ReusePass, ReuseResult, Slots

NO_SLOTS: Slots = np.zeros(0, np.int64)


class GpuRunner(PrefixRows, LayerwiseRunner):
    """A sequence at batch row `batch_row` of the caches, which no other may use until it is `idle`."""

    def __init__(self, executor: Executor, caches: DeviceCaches, batch_row: int):
        config, capacity, slots = executor.config, executor.capacity, caches.slots
        padded_rows = capacity.rows if executor.capturable else 0
        super().__init__(config, slots - capacity.rows, slots, padded_rows=padded_rows)
        self.front_rows = capacity.rows
        self.runs_ahead = True
        self.cuda, self.capacity, self.caches, self.precision = executor.cuda, capacity, caches, executor.precision
        widths = dict.fromkeys(("ids", "positions", "key_mask", "probe_keys", "tracked", "window"), slots)
        self.control = ControlBuffer(self.cuda, 1, widths | {"rows": capacity.rows, "write_index": 1}, self.precision)
        self.result = ResultBuffer(self.cuda, 1, config.layers, capacity.track_num, capacity.rows)
        self.pass_queue = PassQueue(executor, caches, self.control, self.result, batch_row)
        self.input_embeddings: InputEmbeddings | None = None
        self.start(1)  # a batched pass computes idle batch rows too, so they need valid positions and masks
        self.end()

    @property
    def batch_row(self) -> int:
        """The batch row of the caches that holds the sequence."""
        return self.pass_queue.first

    @batch_row.setter
    def batch_row(self, batch_row: int) -> None:
        self.pass_queue.first = batch_row

    def start(self, length: int) -> None:
        """Begin a sequence: position p in slot p; slots from `length` on are dummies, masked as keys."""
        self.length, self.idle = length, False
        self.arrange(np.arange(self.slots))
        self.unembedded = NO_SLOTS  # ids [A] of the first slots whose H[0] is not computed yet
        self.predicted: dict[int, tuple[int, np.float32]] = {}  # by slot: token and confidence, while they are valid

    def end(self) -> None:
        self.idle = True
        if self.input_embeddings is not None:
            self.input_embeddings.free()
            self.input_embeddings = None

    def set_input_embeddings(self, embeddings: NDArray[np.float32]) -> None:
        self.input_embeddings = InputEmbeddings(self.cuda, embeddings, self.precision)

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
        """Move the sequence to another batch row, whose sequence is over."""
        self.caches.relocate(batch_row, self.batch_row)
        self.batch_row = batch_row

    def embed(self, ids: Slots) -> None:
        self.control.edit()
        self.control["ids"][: len(ids)] = np.minimum(ids, self.config.vocab - 1)
        self.unembedded = ids

    def layer(self, index: int, rows: int) -> None:
        self._prepare()
        self.predicted = {}
        self.pass_queue.layer(index, rows)

    def save_previous(self, index: int, rows: int, drift_inputs: DriftInputs) -> Any:
        self._prepare(drift_inputs)
        self.pass_queue.save_previous(index, rows)
        return rows

    def drift(self, index: int, before: Any, drift_inputs: DriftInputs) -> float:
        self._prepare(drift_inputs)
        self.pass_queue.tests(index, before, drift_inputs.kind)
        self.result.fetch()
        return float(self.result["sigma"][index, 0])

    def probe(self, index: int, drift_inputs: DriftInputs) -> Slots:
        """What the tests of the layer have found with its sigma."""
        return np.array(self._probes()[index])

    def run_layers(
        self, rows: int, drift_inputs: DriftInputs | None, first: int = 0, logits_rows: Slots | None = None
    ) -> Probes:
        self._prepare(drift_inputs)
        self.predicted = {}
        for index in range(first, self.config.layers):
            self.pass_queue.layer(index, rows)
            if drift_inputs is not None:
                self.pass_queue.probe(index)
        if drift_inputs is None:
            return []
        self.result.fetch()
        return list(self._probes()[first:].copy())

    def reuse(self, rows: int, drift_inputs: DriftInputs, gamma: float) -> ReuseResult:
        due = ReusePass(self, rows, drift_inputs, gamma)
        if not self.can_run_ahead(due):
            return super().reuse(rows, drift_inputs, gamma)
        self.enqueue(due)
        self.cuda.sync()
        return self.collect(due)

    def can_run_ahead(self, due: ReusePass) -> bool:
        """Whether a pass may run to its end before its sigmas are read."""
        return self.runs_ahead and len(due.drift_inputs.window) <= self.capacity.window

    def has_captured_shape(self, due: ReusePass) -> bool:
        """Whether a pass has the shape of captured graphs: the padded rows, with the window among them."""
        return self.can_run_ahead(due) and due.rows == self.padded_rows

    def set_targets(self, drift_inputs: DriftInputs) -> None:
        """Write the rows that the head, the drift test and the probe of the coming pass read."""
        self.control.set_head_rows(drift_inputs.logits_rows)
        self.control.set_drift_inputs(drift_inputs)

    def enqueue(self, due: ReusePass) -> None:
        """Queue a reuse pass and the download of its results, which are valid after the next wait."""
        self.set_targets(due.drift_inputs)
        # Input embeddings are copied between embed and the first layer, differently in each pass: embed stays outside.
        embeds = self.input_embeddings is None
        if embeds:
            self.control.upload()
        else:
            self._prepare()
        kind, rows = due.drift_inputs.kind, due.rows

        def work() -> None:
            self.pass_queue.reuse(rows, kind, embeds)

        if self.has_captured_shape(due):
            self.pass_queue.replay((kind, self.batch_row, embeds), work)
        else:
            work()
        self.result.download()

    def collect(self, due: ReusePass) -> ReuseResult:
        """The outcome of the pass that was queued, after the wait."""
        result = self.result
        return self.record(due, result["sigma"][:, 0], self._probes(), result["token"], result["confidence"])

    def record(
        self, due: ReusePass, sigma: NDArray[np.float32], probe: Slots, token: Slots, confidence: NDArray[np.float32]
    ) -> ReuseResult:
        """Take over the results of a pass that ran to its end, embedding included.

        sigma [L], probe [L, K]; token and confidence [W] of the logits rows, which `head` returns while they are valid.
        """
        self.unembedded = NO_SLOTS
        predictions = zip(token.tolist(), confidence.copy(), strict=True)
        self.predicted = dict(zip(due.drift_inputs.logits_rows.tolist(), predictions, strict=False))
        return ReuseResult.of(sigma.tolist(), list(probe.copy()), due.gamma)

    def head(self, rows: Slots) -> tuple[Slots, NDArray[np.float32]]:
        if self.predicted.keys() >= set(rows.tolist()):
            tokens, confidences = zip(*(self.predicted[slot] for slot in rows.tolist()), strict=True)
            return np.array(tokens), np.array(confidences)
        chunks = []
        for chunk in self._run_head(rows):
            self.result.fetch()
            chunks.append((self.result["token"][: len(chunk)].copy(), self.result["confidence"][: len(chunk)].copy()))
        token, confidence = map(np.concatenate, zip(*chunks, strict=True))
        return token, confidence

    def logits(self, rows: Slots) -> NDArray[np.float32]:
        chunks = []
        for chunk in self._run_head(rows):
            logits = np.empty((len(chunk), self.config.vocab), np.float32)
            self.cuda.download(logits, self.caches.logits)
            self.cuda.sync()
            chunks.append(logits)
        return np.concatenate(chunks)

    def _run_head(self, rows: Slots) -> Iterator[Slots]:
        """Queue the head chunk by chunk; yields each chunk, whose results are valid until the next."""
        step = self.capacity.window if len(rows) <= self.capacity.window else self.capacity.rows
        for start in range(0, len(rows), step):
            chunk = rows[start : start + step]
            self.control.set_head_rows(chunk)
            self._prepare()
            self.pass_queue.head(step)
            yield chunk

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

    def _prepare(self, drift_inputs: DriftInputs | None = None) -> None:
        """Queue the upload of changed control arrays and the embedding of ids that are not embedded yet."""
        self.control.block_length = self.block_length
        if drift_inputs is not None:
            self.control.set_drift_inputs(drift_inputs)
        self.control.upload()
        if len(self.unembedded):
            self.pass_queue.embed(len(self.unembedded))
            if self.input_embeddings is not None:
                hidden = self.caches.at("h", 0, self.batch_row)
                self.input_embeddings.copy_to(hidden, self.unembedded - self.config.vocab)
            self.unembedded = NO_SLOTS

    def _probes(self) -> Slots:
        """The probed slots [L, K] of the last pass."""
        return self.result["probe"][:, : self.capacity.track_num]
