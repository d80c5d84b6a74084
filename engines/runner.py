"""One sequence on a device: what the controller may ask of its caches and layers.

A `Walk` owns the memory of one sequence (the cache of H, Q, K and V by slot) and
runs parts on its first rows. `SteppedWalk` is the layer-by-layer walk of
Elastic-Cache in terms of three hooks; a back end that can do better runs the
passes in its own way and must give the same result. Nothing here knows windows,
commits, policies or text.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.config import ModelConfig
from engines.errors import BackendError

Slots = NDArray[np.int64]
Probes = Sequence[Slots] | NDArray[np.int64]  # of some layers, one row [K] each


@dataclass(frozen=True)
class DriftInputs:
    """What the drift test and the probe look at in one step, all of it in slots.

    `tracked` and `window` are row numbers within the active set; `probe_keys`
    [S] marks the keys that may be tracked; `kind` is the drift test's variant;
    `readers` are the rows that predict the window.
    """

    kind: str
    tracked: Slots
    window: Slots
    probe_keys: NDArray[np.bool_]
    logits_rows: Slots


@dataclass(frozen=True)
class ReuseResult:
    """Outcome of a reuse pass: `sigma` up to the first layer below gamma, that layer, and the
    tracked slots of the layers up to it, one row [K] each."""

    sigma: list[float]
    trigger: int | None
    probes: Probes

    @classmethod
    def of(cls, sigma: list[float], probes: Probes, gamma: float) -> "ReuseResult":
        """The outcome of layers 0 … n-1 that have run: what came after the first below gamma does not count."""
        trigger = next((index for index, value in enumerate(sigma) if value < gamma), None)
        count = len(sigma) if trigger is None else trigger + 1
        return cls(sigma[:count], trigger, probes[:count])


class SequenceRunner(ABC):
    """The device memory of one sequence.

    Position p starts in slot p; slots from `length` on are dummies, masked as
    keys. The controller moves slots so that the active set occupies the first.
    With `filled`, a pass runs that many rows or all slots: the controller fills
    the active set up with dummies, and their rows and keys move as others do.
    """

    def __init__(self, config: ModelConfig, length: int, slots: int, padded_rows: int = 0):
        self.config, self.length, self.slots, self.padded_rows = config, length, slots, padded_rows

    def end(self) -> None:  # noqa: B027
        """The sequence is over: its rows may be written over."""

    @abstractmethod
    def grow(self, slots: Slots) -> None:
        """Let more positions follow: those in `slots`, which are dummies or come right after the last slot.

        They are keys from now on, so their rows must be run before any other.
        """

    @abstractmethod
    def permute(self, target: Slots, source: Slots) -> None:
        """Let the slots `target` hold what `source` held, the same slots in another order: H, Q, K and V of all
        layers, and positions."""

    def set_input_embeddings(self, embeddings: NDArray[np.float32]) -> None:
        """Let ids from `config.vocab` on stand for the rows of `embeddings` [n, d]; before anything is embedded.

        Raises BackendError where a back end has no such way in.
        """
        raise BackendError("this back end takes no embeddings; use --backend onnxruntime or eager")

    @abstractmethod
    def embed(self, ids: Slots) -> None:
        """Embed ids [A] into H of the first layer at slots 0 … A-1."""

    @abstractmethod
    def layer(self, index: int, rows: int) -> None:
        """Run one layer over the first `rows` slots: reads H[index], writes Q, K, V and H[index + 1]."""

    @abstractmethod
    def run_layers(
        self, rows: int, watch: DriftInputs | None, first: int = 0, logits_rows: Slots | None = None
    ) -> Probes:
        """Run layers `first` … L-1 over the first `rows` slots; the probes of these layers, if there is a watch.

        What leaves the last layer is read in slots `readers` only (None: in all
        that are run), so a walk may leave it out elsewhere.
        """

    @abstractmethod
    def reuse(self, rows: int, watch: DriftInputs, gamma: float) -> ReuseResult:
        """Run the active rows through the layers up to the first whose sigma falls below gamma.

        A walk may run more layers: the refresh that follows overwrites whatever
        the layers after that one wrote, so the outcome is the same.
        """

    @abstractmethod
    def head(self, rows: Slots) -> tuple[Slots, NDArray[np.float32]]:
        """Arg-max token (never [MASK]) and its probability for `rows` of the last layer's output."""

    @abstractmethod
    def logits(self, rows: Slots) -> NDArray[np.float32]:
        """Logits [W, V] of `rows` of the last layer's output."""

    @abstractmethod
    def hidden(self, index: int, rows: int) -> NDArray[np.float32]:
        """H [A, d] of the first `rows` slots entering layer `index` (L: leaving the last); for verification."""

    @abstractmethod
    def set_hidden(self, index: int, hidden: NDArray[np.float32]) -> None:
        """Overwrite H [A, d] of the first slots; for verification."""


@dataclass(frozen=True)
class ReusePass:
    """A reuse pass that is due: the arguments of `Walk.reuse`."""

    runner: SequenceRunner
    rows: int
    watch: DriftInputs
    gamma: float


class LayerwiseRunner(SequenceRunner):
    """A walk that tests and probes each layer right after it has run."""

    optimistic = False  # run the whole reuse pass before looking at its drift numbers

    @abstractmethod
    def save_previous(self, index: int, rows: int, watch: DriftInputs) -> Any:
        """What the drift test needs from before the pass: q of the tracked rows, K of all rows."""

    @abstractmethod
    def drift(self, index: int, before: Any, watch: DriftInputs) -> float:
        """The drift similarity sigma of a layer that has just run."""

    @abstractmethod
    def probe(self, index: int, watch: DriftInputs) -> Slots:
        """The tracked slots [K] of a layer that has just run, most attended first."""

    def run_layers(
        self, rows: int, watch: DriftInputs | None, first: int = 0, logits_rows: Slots | None = None
    ) -> Probes:
        probes = []
        for index in range(first, self.config.layers):
            self.layer(index, rows)
            if watch is not None:
                probes.append(self.probe(index, watch))
        return probes

    def reuse(self, rows: int, watch: DriftInputs, gamma: float) -> ReuseResult:
        sigma: list[float] = []
        probes = []
        for index in range(self.config.layers):
            before = self.save_previous(index, rows, watch)
            self.layer(index, rows)
            sigma.append(self.drift(index, before, watch))
            probes.append(self.probe(index, watch))
            if sigma[-1] < gamma and not self.optimistic:
                break
        return ReuseResult.of(sigma, probes, gamma)
