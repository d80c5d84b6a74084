"""A bundle loaded on a back end: the contract between the runtime and what runs the parts.

A `Model` gives out the walks of sequences and runs plain forwards; one caller
holds it at a time. Nothing here knows windows, commits, policies or text.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.config import Capacity
from engines.errors import BackendError, PromptError
from engines.runner import ReusePass, ReuseResult, SequenceRunner


class Model(ABC):
    """A bundle loaded on a back end; used by one thread at a time."""

    backend: str
    note = ""  # what the user should know about the choice of this back end

    def __init__(self, bundle: Bundle):
        self.bundle, self.config, self.capacity = bundle, bundle.config, bundle.capacity
        self.seconds: dict[str, float] = defaultdict(float)  # each part has run, where a back end can tell
        self.runs: dict[str, int] = defaultdict(int)
        self.closed = False
        self._lock = threading.Lock()

    @property
    @abstractmethod
    def device(self) -> str:
        """Where the model runs, for people: threads or the GPU's name, and versions."""

    @abstractmethod
    def new_runner(self, length: int, limit: int | None = None) -> SequenceRunner:
        """Memory for one sequence of `length` positions that may be extended to `limit` (None: `length`).

        The next walk may take over the memory of those before.
        """

    def new_runners(self, spans: list[tuple[int, int]]) -> Sequence[SequenceRunner]:
        """Memory for sequences that are decoded side by side: the length and the limit of each, as `walk` has them."""
        return [self.new_runner(length, limit) for length, limit in spans]

    def reuse(self, passes: list[ReusePass]) -> list[ReuseResult]:
        """Run the reuse passes of walks taken side by side; the outcome of each is what it would be alone."""
        return [due.runner.reuse(due.rows, due.watch, due.gamma) for due in passes]

    @abstractmethod
    def forward(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """The plain forward: ids [B, N] -> logits [B, N, V]."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the model holds; it cannot be used any more. Closing twice does nothing."""
        self.closed = True

    def logits(self, ids: Any) -> NDArray[np.float32]:
        """The plain full forward, for parity: int array [B, N] (or [N]) -> float32 [B, N, V].

        Raises PromptError for ids that are no such array or lie outside the vocabulary.
        """
        try:
            array = np.atleast_2d(np.asarray(ids))
        except ValueError as error:
            raise PromptError("ids have rows of different lengths; give an integer array [B, N]") from error
        if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
            raise PromptError(f"ids must be a non-empty integer array [B, N], got {array.dtype} {list(array.shape)}")
        check_ids(array, self.config.vocab)
        if array.shape[1] > self.capacity.max_length:
            raise PromptError(
                f"{array.shape[1]} ids exceed the bundle's length {self.capacity.max_length}; "
                "shorten them or build with a larger --max-length"
            )
        with self.exclusive():
            return self.forward(array.astype(np.int64))

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count a run of `part` and its wall-clock seconds in `runs` and `seconds`; the body waits for the result."""
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began
        self.runs[part] += 1

    def exclusive(self) -> "_Exclusive":
        """Hold the model for one caller; raises BackendError if another has it, or it is closed."""
        if self.closed:
            raise BackendError("the model is closed; load it again")
        return _Exclusive(self._lock)


class _Exclusive:
    def __init__(self, lock: threading.Lock):
        self.lock = lock

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            raise BackendError("the model is in use: finish or close the running generation, or load a second one")

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def check_ids(ids: NDArray[Any], vocab: int) -> None:
    """Raises PromptError if an id lies outside the vocabulary."""
    outside = ids[(ids < 0) | (ids >= vocab)]
    if outside.size:
        raise PromptError(f"id {outside.flat[0]} lies outside the vocabulary of {vocab}; check the tokenizer")


def slots_for(capacity: Capacity, length: int) -> int:
    """Slots of a sequence: its positions, and no fewer than the engines' rows."""
    return max(length, capacity.rows)
