"""What the passes of a sequence need from the model that runs them.

A GPU model implements `Executor`; caches, passes, runners and batches take it as an argument and import no model.
"""

from collections.abc import Hashable
from typing import Protocol

from engines.config import Capacity, ModelConfig
from engines.gpu.cuda import Address, Cuda

Binding = tuple[Address, tuple[int, ...]]
"""Address in device memory and shape of an input or output of an engine."""

Bindings = dict[str, Binding]
"""Inputs and outputs of an engine by name."""

REUSE, FULL, GENERAL = 0, 1, 2
"""Profiles of embed and layers: `capacity.rows` rows, all slots, or any number of rows."""

ANY = 1
"""The second profile of the other parts, for any number of rows; their first is REUSE."""


class Engine(Protocol):
    """A compiled part."""

    def run(self, profile: int, bindings: Bindings, place: Hashable = None) -> None:
        """Queue one run; `profile` is REUSE, FULL or GENERAL for embed and layers, REUSE or ANY for head and tests.

        Runs at one `place` have the same addresses while a captured graph contains one of them.
        """


class Executor(Protocol):
    """A loaded model, as passes see it."""

    cuda: Cuda
    config: ModelConfig
    capacity: Capacity
    precision: str  # of weights and caches: fp32, fp16 or bf16
    capturable: bool  # whether the work that an engine queues may be captured as a CUDA graph
    weights: dict[str, Bindings]  # by part: weights that are inputs of its engine

    def engine(self, part: str, slots: int) -> Engine:
        """The engine of `part` for sequences of `slots` slots."""
