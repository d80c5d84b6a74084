"""Model families and their checkpoints: what a family says about itself.

`families` holds a file for each, `registry` finds the one of a config, `keys`
reads a config's values, `checkpoint` the weights, and `reference` computes the
parts. Importing this package imports none of them. Nothing here knows a tensor
library, a file format or a single family.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from engines.config import ModelConfig


class Weight(NamedTuple):
    """Where a part's tensor lies in the checkpoint, and how it is handed out."""

    tensor: str  # name in the checkpoint
    shape: tuple[int, ...]  # as stored; a matrix is stored as [out, in]
    transposed: bool  # handed out as [in, out], because a part computes x @ W; further axes count as `in`


@dataclass(frozen=True)
class Family:
    """A format of checkpoints that share their config keys and weight names.

    `read_config` turns the keys of config.json into numbers and switches of
    `ModelConfig`, which say what the parts compute and which row predicts a
    position, and refuses what is not implemented (CheckpointError). `weights`
    maps the local names of a part of `ModelConfig.parts` or `vision_parts` to
    tensors. `complete` adds to the keys of config.json what other files of the
    published directory say.
    `ignorable` are shell patterns of tensors that a checkpoint may hold though
    no part reads them. `decoding` are the decoding defaults of a bundle,
    `length` the length it is built for where the config allows a longer one
    than the model was trained on. `end_of_turn` is the text of the special
    token that ends a turn of a chat. `split` is the pre-tokenizer's pattern of
    checkpoints that are published with vocab.json and merges.txt alone.
    """

    name: str
    model_type: str
    architectures: tuple[str, ...]
    read_config: Callable[[dict[str, Any]], ModelConfig]
    weights: Callable[[ModelConfig, str], dict[str, Weight]]
    ignorable: tuple[str, ...] = ()
    decoding: Mapping[str, Any] = field(default_factory=dict)
    length: int | None = None
    end_of_turn: str | None = None
    split: str | None = None
    complete: Callable[[Path, dict[str, Any]], dict[str, Any]] = lambda directory, raw: raw
