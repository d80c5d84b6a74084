"""Memory that successive sequences reuse, and the sessions bound to it.

Binding a value takes as long as a small operator, and pages of memory are slow
when they are first used: so an array is made once for each name and shape, and
bound again only where a run uses another array than the run before.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from engines.ort.sessions import Sessions

KEPT = 4096  # arrays that are kept at most: lengths and numbers of rows differ from step to step


class BoundArray(NamedTuple):
    """An array, and the same memory as a value of ONNX Runtime."""

    array: NDArray[Any]
    value: ort.OrtValue

    @classmethod
    def of(cls, array: NDArray[Any]) -> "BoundArray":
        """A value on the memory of `array`, which must be contiguous; nothing is copied."""
        assert array.flags.c_contiguous
        return cls(array, ort.OrtValue.ortvalue_from_numpy(array))  # the value keeps the array alive


class Workspace:
    """The memory of one sequence by name, and what the sessions are bound to.

    A name's memory has one element type. It grows as needed and is never freed,
    so the next sequence that uses the workspace overwrites that of the one before.
    """

    def __init__(self, sessions: Sessions):
        self.sessions = sessions
        self.memory: dict[str, NDArray[Any]] = {}
        self.arrays: dict[tuple[str, tuple[int, ...]], BoundArray] = {}  # views of the memory, by name and shape
        self.split: dict[str, tuple[BoundArray, list[BoundArray]]] = {}
        self.bindings = {part: session.io_binding() for part, session in sessions.items()}
        self.bound: dict[str, dict[str, BoundArray]] = {part: {} for part in self.bindings}

    def take(self, name: str, *shape: int, dtype: Any = np.float32) -> BoundArray:
        """An array of `shape` in the memory `name`; its content is whatever was written there last."""
        if (name, shape) not in self.arrays:
            size = math.prod(shape)
            if name not in self.memory or size > len(self.memory[name]):
                self.memory[name] = np.empty(size + size // 4, dtype)
                self.arrays = {key: array for key, array in self.arrays.items() if key[0] != name}
            if len(self.arrays) >= KEPT:
                self.arrays.clear()
            self.arrays[name, shape] = BoundArray.of(self.memory[name][:size].reshape(shape))
        return self.arrays[name, shape]

    def planes(self, name: str, *shape: int) -> tuple[BoundArray, list[BoundArray]]:
        """An array as `take` makes it, and each plane [1, …] along its first axis."""
        whole = self.take(name, *shape)
        if name not in self.split or self.split[name][0] is not whole:
            self.split[name] = whole, [BoundArray.of(plane) for plane in whole.array[:, None]]
        return self.split[name]

    def put(self, name: str, array: NDArray[Any]) -> BoundArray:
        """A copy of `array` in the memory `name`."""
        copy = self.take(name, *array.shape, dtype=array.dtype)
        copy.array[...] = array
        return copy

    def bind(self, part: str, inputs: Mapping[str, BoundArray], outputs: Mapping[str, BoundArray]) -> None:
        """Bind inputs and outputs of `part` by name; bindings of other names stay."""
        self.sessions.check_open()
        bound, binding = self.bound[part], self.bindings[part]
        for name, array in inputs.items():
            if bound.get(name) is not array:
                bound.pop(name, None)  # after Ctrl-C between these lines the next run binds it again
                binding.bind_ortvalue_input(name, array.value)
                bound[name] = array
        for name, array in outputs.items():
            if bound.get(name) is not array:
                bound.pop(name, None)
                binding.bind_ortvalue_output(name, array.value)
                bound[name] = array

    def run(self, part: str, inputs: Mapping[str, BoundArray], outputs: Mapping[str, BoundArray]) -> None:
        """Bind these, then run `part` on all that is bound."""
        self.bind(part, inputs, outputs)
        self.sessions.run_bound(part, self.bindings[part])
