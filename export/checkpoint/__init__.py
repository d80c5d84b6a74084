"""Model families and the reading of their checkpoints.

`families` holds one file for each family, and `registry` finds the family of a
config.json. A family reads its keys strictly (`config_keys`) and names the
tensors of each part; `reader` opens a checkpoint and reads its parts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from engines.config import ModelConfig


class Weight(NamedTuple):
    """The tensor of a checkpoint that a part's weight is read from, or several of one shape that are stacked."""

    tensor: str  # name in the checkpoint; of stacked tensors with * for their number
    shape: tuple[int, ...]  # as stored; a matrix is stored as [out, in]
    transposed: bool  # read as [in, out], because a part computes x @ W; axes after the first count as one `in`
    stacked: int | None = None  # how many tensors become one with a new first axis
    rows: tuple[int, int] | None = None  # the first of its rows in a tensor that holds more, and how many that has

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all tensors in the checkpoint."""
        return (
            (self.tensor,)
            if self.stacked is None
            else tuple(self.tensor.replace("*", str(number)) for number in range(self.stacked))
        )

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the checkpoint."""
        return self.shape if self.rows is None else (self.rows[1], *self.shape[1:])

    @property
    def read_shape(self) -> tuple[int, ...]:
        """The weight's shape as it is read."""
        one = (math.prod(self.shape[1:]), self.shape[0]) if self.transposed else self.shape
        return one if self.stacked is None else (self.stacked, *one)


Naming = Callable[[ModelConfig, str], dict[str, Weight]]  # (config, part) -> local name -> tensor


@dataclass(frozen=True)
class Family:
    """A format of checkpoints that share their config keys and tensor names.

    `read_config` turns the keys of config.json into a `ModelConfig` and raises
    CheckpointError for what is not implemented. `weights(config, part)` maps the
    local names of a part of `ModelConfig.parts` or `vision_parts` to tensors.
    `complete` adds keys to those of config.json that are in other files of the
    published directory.
    """

    name: str
    model_type: str
    architectures: tuple[str, ...]
    read_config: Callable[[dict[str, Any]], ModelConfig]
    weights: Naming
    namings: tuple[Naming, ...] = ()  # other names that the same tensors are published under
    published: tuple[str, ...] = ()  # names of its checkpoints on the hub
    ignorable: tuple[str, ...] = ()  # shell patterns of tensors that no part reads
    decoding: Mapping[str, Any] = field(default_factory=dict)  # decoding defaults of a bundle
    length: int | None = None  # most positions of a bundle by default, where the config allows more than were trained
    ids: Mapping[str, int] = field(default_factory=dict)  # key of config.json -> published id, where no file names it
    end_of_turn: str | None = None  # text of the special token that ends a turn of a chat
    ends: tuple[str, ...] = ()  # texts of more special tokens that end an answer
    mask: str | None = None  # text of the mask, where all tokenizers of the family have it
    tokenizer: str | None = None  # class of transformers that equals the tokenizer class in published code
    complete: Callable[[Path, dict[str, Any]], dict[str, Any]] = lambda directory, raw: raw
