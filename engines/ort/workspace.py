"""Memory that sequences use one after the other, and the sessions bound to it.

Binding a value takes as long as a small operator, and fresh pages are slow: an
array is made once for each name and shape, and bound again only where a run has
another one than the run before. Nothing here knows what the parts compute.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

if TYPE_CHECKING:
    from engines.ort.model import OnnxRuntimeModel

KEPT = 4096  # arrays that are remembered: lengths and rows differ from step to step


class BoundArray(NamedTuple):
    """An array, and the same memory as ONNX Runtime knows it."""

    array: NDArray[Any]
    value: ort.OrtValue

    @classmethod
    def of(cls, array: NDArray[Any]) -> "BoundArray":
        assert array.flags.c_contiguous
        return cls(array, ort.OrtValue.ortvalue_from_numpy(array))  # no copy; it holds on to the array


class Workspace:
    """The memory of one sequence, by name, and what each part's session is bound to."""

    def __init__(self, model: "OnnxRuntimeModel"):
        self.model = model
        self.blocks: dict[str, NDArray[Any]] = {}
        self.held: dict[tuple[str, tuple[int, ...]], BoundArray] = {}
        self.split: dict[str, tuple[BoundArray, list[BoundArray]]] = {}
        self.bindings = {part: session.io_binding() for part, session in model.sessions.items()}
        self.bound: dict[str, dict[str, BoundArray]] = {part: {} for part in self.bindings}

    def take(self, name: str, *shape: int, dtype: Any = np.float32) -> BoundArray:
        """An array in the memory called `name`, which is always of one type; its old content may be in it."""
        if (name, shape) not in self.held:
            size = math.prod(shape)
            if name not in self.blocks or size > len(self.blocks[name]):
                self.blocks[name] = np.empty(size + size // 4, dtype)
                self.held = {key: held for key, held in self.held.items() if key[0] != name}
            if len(self.held) >= KEPT:
                self.held.clear()
            self.held[name, shape] = BoundArray.of(self.blocks[name][:size].reshape(shape))
        return self.held[name, shape]

    def planes(self, name: str, *shape: int) -> tuple[BoundArray, list[BoundArray]]:
        """As `take`, and each of its planes [1, …] too."""
        whole = self.take(name, *shape)
        if name not in self.split or self.split[name][0] is not whole:
            self.split[name] = whole, [BoundArray.of(plane) for plane in whole.array[:, None]]
        return self.split[name]

    def put(self, name: str, array: NDArray[Any]) -> BoundArray:
        """A copy of `array` in the memory called `name`."""
        held = self.take(name, *array.shape, dtype=array.dtype)
        held.array[...] = array
        return held

    def bind(self, part: str, inputs: Mapping[str, BoundArray], outputs: Mapping[str, BoundArray]) -> None:
        """Have `part` read and write these; what was bound before under other names stays."""
        bound, binding = self.bound[part], self.bindings[part]
        for name, held in inputs.items():
            if bound.get(name) is not held:
                bound.pop(name, None)  # so that one who is interrupted here binds it the next time
                binding.bind_ortvalue_input(name, held.value)
                bound[name] = held
        for name, held in outputs.items():
            if bound.get(name) is not held:
                bound.pop(name, None)
                binding.bind_ortvalue_output(name, held.value)
                bound[name] = held

    def run(self, part: str, inputs: Mapping[str, BoundArray], outputs: Mapping[str, BoundArray]) -> None:
        self.bind(part, inputs, outputs)
        self.model.run_bound(part, self.bindings[part])
