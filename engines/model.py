"""A bundle loaded on a back end: the contract between the runtime and what runs the parts.

A `Model` makes the runners of sequences and computes plain forward passes. One
caller uses it at a time.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.config import Capacity
from engines.errors import BackendError, OptionError, PromptError
from engines.runner import ReusePass, ReuseResult, SequenceRunner


class Model(ABC):
    """A bundle loaded on a back end; used by one thread at a time.

    `runs` counts how often each part ran and `seconds` is the wall-clock time of
    that, where a back end waits for each part.
    """

    backend: str

    def __init__(self, bundle: Bundle):
        self.bundle, self.config, self.capacity = bundle, bundle.config, bundle.capacity
        self.seconds: dict[str, float] = defaultdict(float)
        self.runs: dict[str, int] = defaultdict(int)
        self.closed = False
        self._lock = threading.Lock()

    def __reduce__(self) -> NoReturn:
        """Refuse pickling and copying: engines belong to their process."""
        raise BackendError(
            "a loaded model cannot be pickled, copied or sent to another process, as its engines belong to this one; "
            f"load the bundle there with runtime.load({str(self.bundle.root)!r})"
        )

    @property
    @abstractmethod
    def device(self) -> str:
        """Where the model runs, as text for people: threads or the GPU's name, and versions."""

    @abstractmethod
    def new_runners(self, spans: list[tuple[int, int]]) -> Sequence[SequenceRunner]:
        """Memory for sequences that are decoded side by side.

        `spans` has the length of each sequence in positions and the limit it may
        grow to. The runners of the next call may use the same memory again.
        """

    def new_runner(self, length: int, limit: int | None = None) -> SequenceRunner:
        """Memory for one sequence; see `new_runners`. `limit` None is `length`."""
        return self.new_runners([(length, limit or length)])[0]

    def reuse(self, passes: list[ReusePass]) -> list[ReuseResult]:
        """Run the reuse passes of runners of one `new_runners`; each result is what the runner alone would give."""
        return [due.runner.reuse(due.rows, due.drift_inputs, due.gamma) for due in passes]

    def forward(
        self, ids: NDArray[np.int64], rows: NDArray[np.int64] | None = None, block_length: int | None = None
    ) -> NDArray[np.float32]:
        """The plain forward of ids [B, P] within the vocabulary: logits [B, P, V] in float32.

        With `rows` [W] only the logits of these positions are computed: [B, W, V].
        `block_length` is that of block-causal attention (None: the model's own).
        """
        logits = []
        for row in ids:
            runner = self.new_runner(len(row))
            runner.block_length = block_length or runner.block_length
            run = runner.slots if runner.padded_rows else len(row)
            runner.embed(np.pad(row, (0, run - len(row))))
            runner.run_layers(run, None)
            logits.append(runner.logits(np.arange(len(row)) if rows is None else rows))
        return np.stack(logits)

    @abstractmethod
    def close(self) -> None:
        """Free what the model holds; it cannot be used any more. Closing twice does nothing."""
        self.closed = True

    def logits(
        self, ids: Any, rows: NDArray[np.int64] | None = None, block_length: int | None = None
    ) -> NDArray[np.float32]:
        """The plain forward: an integer array [B, P] or [P] -> float32 [B, P, V].

        With `rows` [W] only the logits of these positions are computed: [B, W, V].
        `block_length` is that of block-causal attention (None: the model's own).
        Raises PromptError for ids that are no such array, lie outside the
        vocabulary or are more than the bundle's length; OptionError for a block length
        of a model whose attention is not block-causal; BackendError if the model is in
        use or closed.
        """
        if block_length is not None and (self.config.block_length is None or block_length < 1):
            raise OptionError(
                f"block_length {block_length} is for models with block-causal attention, and at least 1; leave it out"
            )
        try:
            array = np.atleast_2d(np.asarray(ids))
        except ValueError as error:
            raise PromptError("ids have rows of different lengths; give an integer array [B, P]") from error
        if array.ndim != 2 or array.size == 0 or not np.issubdtype(array.dtype, np.integer):
            raise PromptError(f"ids must be a non-empty integer array [B, P], got {array.dtype} {list(array.shape)}")
        check_ids(array, self.config.vocab)
        if array.shape[1] > self.capacity.max_length:
            raise PromptError(
                f"{array.shape[1]} ids exceed the bundle's length {self.capacity.max_length}; "
                f"shorten them{self.bundle.enlarge('--max-length', array.shape[1])}"
            )
        with self.exclusive():
            return self.forward(array.astype(np.int64), rows, block_length)

    def timed(self, part: str) -> "_Timed":
        """Count a run of `part` and its wall-clock seconds in `runs` and `seconds`; the body waits for the result."""
        return _Timed(self, part)

    def exclusive(self) -> "_Exclusive":
        """Hold the model for one caller; raises BackendError if another uses it, or it is closed."""
        if self.closed:
            raise BackendError("the model is closed; load it again")
        return _Exclusive(self._lock)


class _Timed:
    """The context of one run; a class, since a generator takes three times as long, several times a step."""

    def __init__(self, model: Model, part: str):
        self.model, self.part = model, part

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.model.seconds[self.part] += time.perf_counter() - self.began
            self.model.runs[self.part] += 1


class _Exclusive:
    """A context that holds a lock without waiting for it."""

    def __init__(self, lock: threading.Lock):
        self.lock = lock

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            raise BackendError("the model is in use: finish or close the running generation, or load a second one")

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def check_ids(ids: NDArray[Any], vocab: int) -> None:
    """Raise PromptError if one of `ids` (any shape) lies outside the vocabulary of `vocab` ids."""
    outside = ids[(ids < 0) | (ids >= vocab)]
    if outside.size:
        raise PromptError(f"id {outside.flat[0]} lies outside the vocabulary of {vocab}; check the tokenizer")


def slots_for(capacity: Capacity, length: int) -> int:
    """Slots of a sequence of `length` positions: as many, but no fewer than the rows of a reuse pass."""
    return max(length, capacity.rows)
