"""The contract of a runner: one sequence's memory on a device, and how layers run on it.

A `SequenceRunner` owns the caches of H, Q, K and V of one sequence, by slot, and runs parts on its first slots.
`LayerwiseRunner` is the reuse pass of Elastic-Cache (arXiv 2510.14973), layer by layer, on top of `layer` and three
hooks (`save_previous`, `drift`, `probe`). A back end that has a faster way overrides whole passes and must give the
same results. Axis letters: see `engines.signatures`.
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
"""Slot numbers, or other integers such as ids; a vector unless stated otherwise."""

Probes = Sequence[Slots] | NDArray[np.int64]
"""The tracked slots [K] of some layers, one row a layer."""


@dataclass(frozen=True)
class DriftInputs:
    """The rows and keys that the drift test and the probe of a step read, as slots.

    Active rows occupy the first slots, so a slot is also the number of an active row.
    """

    kind: str  # of the drift test, one of `signatures.gpu.DRIFTS`
    # [T]
    tracked: Slots
    # [W]
    window: Slots
    # [S], true for keys that may be tracked
    probe_keys: NDArray[np.bool_]
    # [W], the rows that predict the window
    logits_rows: Slots


@dataclass(frozen=True)
class ReuseResult:
    """The outcome of a reuse pass: the layers up to the trigger, or all L where none triggered."""

    # [layers up to the trigger]
    sigma: list[float]
    trigger: int | None  # the first layer whose sigma is below gamma
    # [layers up to the trigger, K]
    probes: Probes

    @classmethod
    def of(cls, sigma: list[float], probes: Probes, gamma: float) -> "ReuseResult":
        """The outcome where layers 0 … n-1 have run: those after the first sigma below `gamma` are cut off."""
        trigger = next((index for index, value in enumerate(sigma) if value < gamma), None)
        count = len(sigma) if trigger is None else trigger + 1
        return cls(sigma[:count], trigger, probes[:count])


class SequenceRunner(ABC):
    """The device memory of one sequence, and the passes over it.

    Position p starts in slot p. Slots from `length` on are dummies, which are masked as keys. The controller permutes
    slots so that the active set occupies the first ones. If `padded_rows` is not 0, a pass runs exactly that many
    rows or all slots; the controller then pads the active set with dummies. Where attention is block-causal, a row sees
    the keys up to the end of its block of `block_length` positions.
    """

    def __init__(self, config: ModelConfig, length: int, slots: int, padded_rows: int = 0):
        self.config, self.length, self.slots, self.padded_rows = config, length, slots, padded_rows
        self.front_rows = 0  # the first slots in which tracked rows and window must lie; 0: they may lie anywhere
        self.block_length = config.block_length  # may be set to another before the first pass

    def end(self) -> None:  # noqa: B027
        """End the sequence: the next one may use its memory."""

    @abstractmethod
    def grow(self, slots: Slots) -> None:
        """Add positions to the sequence in `slots`, which are dummies or follow the last slot.

        They count as keys from now on, so run their rows before any other.
        """

    @abstractmethod
    def permute(self, target: Slots, source: Slots) -> None:
        """Move the rows of slots `source` to slots `target`: H, Q, K and V of all layers, and the positions.

        `target` and `source` are the same set of slots in different orders.
        """

    @abstractmethod
    def arrange(self, position_at: Slots) -> None:
        """Let slot s hold position `position_at[s]`, a permutation [slots], before anything is computed."""

    @abstractmethod
    def prefix_state(self, count: int) -> "PrefixState":
        """A copy of H of the layers but the first, Q, K and V of the first `count` slots."""

    @abstractmethod
    def set_prefix_state(self, state: "PrefixState", slot: int) -> None:
        """Write the rows of a state to the slots from `slot` on; the state stays as it is.

        Raises BackendError for a state that another model made.
        """

    def set_input_embeddings(self, embeddings: NDArray[np.float32]) -> None:
        """Let id `config.vocab + i` stand for row i of `embeddings` [n, d]; call it before `embed`.

        Raises BackendError if the back end cannot.
        """
        raise BackendError("this back end takes no input embeddings; use --backend onnxruntime or eager")

    @abstractmethod
    def embed(self, ids: Slots) -> None:
        """Embed ids [A] into H[0] of slots 0 … A-1."""

    @abstractmethod
    def layer(self, index: int, rows: int) -> None:
        """Run one layer over the first `rows` slots: reads H[index], writes Q, K, V and H[index + 1]."""

    @abstractmethod
    def run_layers(
        self, rows: int, drift_inputs: DriftInputs | None, first: int = 0, logits_rows: Slots | None = None
    ) -> Probes:
        """Run layers `first` … L-1 over the first `rows` slots; returns their probes, or none without `drift_inputs`.

        Only the output rows `logits_rows` of the last layer will be read (None: all), so a runner may leave out the
        others.
        """

    @abstractmethod
    def reuse(self, rows: int, drift_inputs: DriftInputs, gamma: float) -> ReuseResult:
        """Run the active rows through the layers up to the first whose sigma is below `gamma`.

        A runner may run more layers than that: the refresh that follows overwrites everything the later layers wrote.
        """

    @abstractmethod
    def head(self, rows: Slots) -> tuple[Slots, NDArray[np.float32]]:
        """The most probable token, never [MASK], and its probability at slots `rows`, each [W].

        The rows are those of the last layer's output.
        """

    @abstractmethod
    def logits(self, rows: Slots) -> NDArray[np.float32]:
        """Logits [W, V] at slots `rows` [W] of the last layer's output."""

    @abstractmethod
    def hidden(self, index: int, rows: int) -> NDArray[np.float32]:
        """H[index] [A, d] of the first `rows` slots, for verification.

        H[index] is the input of layer `index`, H[L] the output of the last layer.
        """

    @abstractmethod
    def set_hidden(self, index: int, hidden: NDArray[np.float32]) -> None:
        """Overwrite H[index] [A, d] of the first slots; for verification."""


class PrefixState:
    """The rows of a prefix in all caches, as a back end keeps them; `rows` of them, `nbytes` bytes."""

    def __init__(self, owner: Any, content: Any, rows: int, nbytes: int):
        self.owner, self.content, self.rows, self.nbytes = owner, content, rows, nbytes

    def of(self, owner: Any) -> Any:
        """The content; raises BackendError if another model than `owner` made it."""
        if self.owner is not owner:
            raise BackendError("the state of a prefix belongs to the model that made it; make it with this one")
        return self.content

    def free(self) -> None:
        """Free memory on a device."""


@dataclass(frozen=True)
class ReusePass:
    """A reuse pass that is due: a runner and the arguments of its `reuse`."""

    runner: SequenceRunner
    rows: int
    drift_inputs: DriftInputs
    gamma: float


class LayerwiseRunner(SequenceRunner):
    """A runner that tests and probes each layer right after it has run."""

    runs_ahead = False  # whether `reuse` runs all layers before it searches for the trigger

    @abstractmethod
    def save_previous(self, index: int, rows: int, drift_inputs: DriftInputs) -> Any:
        """Save what the drift test of a layer needs from before the pass: Q of the tracked rows, K of all rows."""

    @abstractmethod
    def drift(self, index: int, before: Any, drift_inputs: DriftInputs) -> float:
        """The sigma of a layer that has just run; `before` is what `save_previous` returned."""

    @abstractmethod
    def probe(self, index: int, drift_inputs: DriftInputs) -> Slots:
        """The tracked slots [K] of a layer that has just run, in descending order of attention."""

    def run_layers(
        self, rows: int, drift_inputs: DriftInputs | None, first: int = 0, logits_rows: Slots | None = None
    ) -> Probes:
        probes = []
        for index in range(first, self.config.layers):
            self.layer(index, rows)
            if drift_inputs is not None:
                probes.append(self.probe(index, drift_inputs))
        return probes

    def reuse(self, rows: int, drift_inputs: DriftInputs, gamma: float) -> ReuseResult:
        sigma: list[float] = []
        probes = []
        for index in range(self.config.layers):
            before = self.save_previous(index, rows, drift_inputs)
            self.layer(index, rows)
            sigma.append(self.drift(index, before, drift_inputs))
            probes.append(self.probe(index, drift_inputs))
            if sigma[-1] < gamma and not self.runs_ahead:
                break
        return ReuseResult.of(sigma, probes, gamma)
