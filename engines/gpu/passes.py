"""Queue parts over the first rows of one sequence, or of several at once.

The rows of one sequence are contiguous, so its engines read and write them in the caches. Those of several
sequences are not: hidden states and Q go through staging buffers [B, R, …], and what a part leaves there is copied
to the rows of each sequence.
"""

import logging
from collections.abc import Callable, Hashable
from typing import Any

from engines.config import layer_name
from engines.errors import BackendError
from engines.gpu.cache import DeviceCaches
from engines.gpu.cuda import Address
from engines.gpu.executor import ANY, FULL, GENERAL, REUSE, Binding, Executor
from engines.gpu.staging import ControlBuffer, ResultBuffer

logger = logging.getLogger(__name__)


class PassQueue:
    """Queues parts over the first rows of `batch` sequences, those at batch rows `first` … `first + batch - 1`.

    It owns the captured graphs of these passes.
    """

    def __init__(
        self, executor: Executor, caches: DeviceCaches, control: ControlBuffer, result: ResultBuffer, first: int = 0
    ):
        self.executor, self.cuda, self.caches = executor, executor.cuda, caches
        self.config, self.capacity = executor.config, executor.capacity
        self.control, self.result = control, result
        self.first, self.batch = first, 1
        self.graphs: dict[Hashable, Any] = {}  # by key; None after the first run, which only warms the engines up
        self.uncaptured: set[Hashable] = set()  # keys whose capture failed

    def replay(self, key: Hashable, work: Callable[[], None]) -> None:
        """Queue the operations that `work` queues.

        The same key must always stand for the same operations, shapes and addresses: where the executor allows it, the
        second call captures them as a CUDA graph, which this and later calls launch. What cannot be captured is queued
        as it is, then and later.
        """
        graph = self.graphs.get(key)
        if graph is None and key in self.graphs and self.executor.capturable and key not in self.uncaptured:
            try:
                graph = self.graphs[key] = self.cuda.capture(work)
            except BackendError as error:
                self.uncaptured.add(key)
                logger.warning("a pass cannot be captured as a CUDA graph and runs without one: %s", str(error))
        if graph is not None:
            self.cuda.launch(graph)
        else:
            work()
            self.graphs[key] = None

    def release(self) -> None:
        """Free the captured graphs."""
        for graph in self.graphs.values():
            if graph is not None:
                self.cuda.destroy(graph)
        self.graphs.clear()

    def reuse(self, rows: int, kind: str, embeds: bool = True) -> None:
        """Queue a reuse pass to its end: embed, every layer with its drift test `kind` and its probe, and the head."""
        if embeds:
            self.embed(rows)
        for index in range(self.config.layers):
            self.save_previous(index, rows)
            self.layer(index, rows)
            self.tests(index, rows, kind)
        self.head(self.capacity.window)

    def embed(self, rows: int) -> None:
        """Queue the embedding of `ids` to H[0]."""
        hidden = self._hidden(0), (self.batch, rows, self.config.d_model)
        self._run("embed", self._profile(rows), ids=self._control("ids", rows), hidden=hidden)
        self._unstage("h", 0, rows, hidden[0])

    def layer(self, index: int, rows: int) -> None:
        """Queue a layer over the first `rows` slots: H[index] to Q, K, V and H[index + 1]."""
        shape = self.batch, rows, self.config.d_model
        hidden, hidden_out, q = self._hidden(index), self._hidden(index + 1), self._q(index)
        k, v = self._keys("k", index), self._keys("v", index)
        self._run(
            layer_name(index), self._profile(rows), index, hidden=(hidden, shape), hidden_out=(hidden_out, shape),
            positions=self._control("positions", rows), key_bias=self._control("key_bias", self.caches.slots),
            write_index=(self.control.address["write_index"], (self.batch,)), q=(q, self._heads(rows)),
            k_cache=k, v_cache=v, k_cache_out=k, v_cache_out=v, **self._blocks(rows),
        )  # fmt: skip
        self._unstage("h", index + 1, rows, hidden_out)
        self._unstage("q", index, rows, q)

    def _blocks(self, rows: int) -> dict[str, Binding]:
        """What a layer with block-causal attention takes more: the positions of all slots, and the ends of blocks."""
        if self.config.block_length is None:
            return {}
        positions = self._control("positions", self.caches.slots)
        return {"key_positions": positions, "block_ends": self._control("block_ends", rows)}

    def save_previous(self, index: int, rows: int) -> None:
        """Queue copies of what the drift test needs as it was before a pass of `rows` rows.

        That is K of the rows, and Q of the first R slots, which the tests read.
        """
        for name, target, count in (("q", self.caches.q_prev, self.capacity.rows), ("k", self.caches.k_prev, rows)):
            row, planes = self.caches.width[name], self.batch * self.caches.planes[name]
            source = self.caches.at(name, index, self.first)
            self.cuda.copy_rows(target, count * row, source, self.caches.slots * row, count * row, planes)

    def tests(self, index: int, rows: int, kind: str) -> None:
        """Queue the tests of a layer after `rows` rows ran: `sigma` [B] of the drift test, and `probe` [B, K]."""
        slots, read = self.caches.slots, self.capacity.rows
        self._run(
            f"tests_{kind}", REUSE if rows == read else ANY, layer=index,
            q_prev=(self.caches.q_prev, self._heads(read)), q_now=(self._q(index), self._heads(read)),
            tracked_rows=self._control("tracked", read), window_rows=self._control("window", read),
            k_prev=(self.caches.k_prev, (self.batch, self.config.kv_heads, rows, self.config.head_size)),
            k_cache=self._keys("k", index), key_bias=self._control("key_bias", slots),
            probe_keys=self._control("probe_keys", slots),
            sigma=(self.result.line("sigma", index), (self.batch,)), probe=self._probe(index),
        )  # fmt: skip

    def probe(self, index: int) -> None:
        """Queue the probe of a layer, over its first R slots, to `probe` [B, K]."""
        slots, read = self.caches.slots, self.capacity.rows
        self._run(
            "probe", REUSE, layer=index, q_window=(self._q(index), self._heads(read)),
            window_rows=self._control("window", read), probe_keys=self._control("probe_keys", slots),
            k_cache=self._keys("k", index), key_bias=self._control("key_bias", slots), probe=self._probe(index),
        )  # fmt: skip

    def _probe(self, index: int) -> Binding:
        return self.result.line("probe", index), (self.batch, self.capacity.track_num)

    def head(self, rows: int) -> None:
        """Queue the head for the `rows` slots that the control buffer names, to `token` and `confidence` [B, rows]."""
        c = self.config
        hidden = self.caches.at("h", c.layers, self.first), (self.batch, self.caches.slots, c.d_model)
        self._run(
            "head", REUSE if rows == self.capacity.window else ANY, hidden=hidden, rows=self._control("rows", rows),
            token=self._result("token", rows), confidence=self._result("confidence", rows),
            logits=(self.caches.logits, (self.batch, rows, c.vocab)),
        )  # fmt: skip

    def _hidden(self, index: int) -> Address:
        """The input of a layer; two staging buffers alternate, because no layer may write what it reads."""
        return self.caches.at("h", index, self.first) if self.batch == 1 else self.caches.staging[index % 2]

    def _q(self, index: int) -> Address:
        return self.caches.at("q", index, self.first) if self.batch == 1 else self.caches.staging[2]

    def _unstage(self, name: str, index: int, rows: int, staged: Address) -> None:
        """Copy staged rows to those of each sequence; the rows of a single sequence are in its cache already."""
        if self.batch > 1:
            width, pitch = rows * self.caches.width[name], self.caches.size(name)
            self.cuda.copy_rows(self.caches.at(name, index, self.first), pitch, staged, width, width, self.batch)

    def _heads(self, rows: int) -> tuple[int, ...]:
        return self.batch, rows, self.config.heads, self.config.head_size

    def _keys(self, name: str, index: int) -> Binding:
        shape = self.batch, self.config.kv_heads, self.caches.slots, self.config.head_size
        return self.caches.at(name, index, self.first), shape

    def _control(self, name: str, width: int) -> Binding:
        return self.control.address[name], (self.batch, width)

    def _result(self, name: str, width: int) -> Binding:
        return self.result.address[name], (self.batch, width)

    def _profile(self, rows: int) -> int:
        return {self.capacity.rows: REUSE, self.caches.slots: FULL}.get(rows, GENERAL)

    def _run(self, part: str, profile: int, layer: int | None = None, **bindings: Binding) -> None:
        weights = self.executor.weights.get(part, {})
        place = part, layer, self.first, id(self)  # of one captured graph at most, whose context keeps these addresses
        self.executor.engine(part, self.caches.slots).run(profile, bindings | weights, place)
