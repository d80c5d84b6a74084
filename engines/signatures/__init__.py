"""Inputs and outputs of every graph: shared by what writes a graph (`export.graphs`) and what binds it (`engines`)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a part: its element type and named axes (numbers are static)."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]


@dataclass(frozen=True)
class GraphSignature:
    """The ports of one graph. `aliases` maps each output written in place to its input.

    `form` is "gpu" where attention is one operator, as GPUs have it, or "cpu"
    where it is written out and gives its rows away, as the CPU runs it (`engines.signatures.cpu`).
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    dialect: str = "gpu"
