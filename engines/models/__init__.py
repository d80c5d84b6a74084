"""Model families and their checkpoints: what a family says about itself.

`registry` finds a family, a file like `llada` is one, `checkpoint` reads the
weights and `reference` computes the parts. Importing this package imports none
of them. Nothing here knows a tensor library, a file format or a single family.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from engines.spec import ModelConfig


class Weight(NamedTuple):
    """Where a part's tensor lies in the checkpoint, and how it is handed out."""

    tensor: str  # name in the checkpoint
    shape: tuple[int, ...]  # as stored; a matrix is stored as [out, in]
    transposed: bool  # handed out as [in, out], because a part computes x @ W


@dataclass(frozen=True)
class Family:
    """A format of checkpoints that share their config keys and weight names.

    `read_config` turns the keys of config.json into numbers and refuses what is
    not implemented (CheckpointError). `weights` maps the local names of a part
    of `ModelConfig.parts` to tensors. `ignorable` are shell patterns of tensors
    that a checkpoint may hold though no part reads them.
    """

    name: str
    model_type: str
    architectures: tuple[str, ...]
    read_config: Callable[[dict[str, Any]], ModelConfig]
    weights: Callable[[ModelConfig, str], dict[str, Weight]]
    ignorable: tuple[str, ...] = ()
