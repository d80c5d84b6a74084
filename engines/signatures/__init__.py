"""Inputs and outputs of every graph, shared by the code that writes a graph and the code that binds it.

Shapes are written with named axes. Each letter has one meaning in the whole project:

| axis | size                                                                       |
|------|----------------------------------------------------------------------------|
| B    | batch: sequences that run in one pass                                      |
| A    | active rows: the rows that a pass runs                                     |
| S    | slots of a sequence's cache; on the CPU, where nothing is padded, positions |
| R    | `Capacity.rows`, the fixed number of rows of a captured reuse pass         |
| H    | attention heads                                                            |
| G    | key/value heads                                                            |
| D    | size of a head                                                             |
| d    | width of a hidden state                                                    |
| V    | vocabulary: columns of the logits                                          |
| T    | tracked rows                                                               |
| W    | window rows; for the head, the rows that predict the window (logits rows)  |
| O    | output rows: those for which the last layer computes its output            |
| K    | tracked keys of a layer (`track_num`)                                      |
| L    | layers                                                                     |
| P    | positions of a prompt; for images, patches of a tile                       |
| N    | tiles of images                                                            |
| C    | channels of a tile                                                         |
| Y, X | rows and columns of a tile's pixels                                        |
| E    | width of the vision tower                                                  |
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type (fp32, fp16, bf16, int64, bool) and axes of an input or output.

    An axis is a letter of the table above, where its size may vary, or a number.
    """

    name: str
    dtype: str
    axes: tuple[str | int, ...]


@dataclass(frozen=True)
class GraphSignature:
    """Name, inputs and outputs of one graph.

    `aliases` pairs each output that is written in place with its input.
    `dialect` is "gpu" where attention is one fused operator (`signatures.gpu`) or "cpu" where attention is
    written out and its rows are outputs (`signatures.cpu`).
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    dialect: str = "gpu"
