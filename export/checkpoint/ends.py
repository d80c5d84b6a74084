"""The ids that end an answer, as a checkpoint declares them in several places.

config.json and generation_config.json each have an EOS or a list of some, and
they may differ; the family names the token that ends a turn. All of them count.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from engines.config import ModelConfig
from engines.errors import CheckpointError
from export.checkpoint import Family
from export.checkpoint.generation import generation_config
from export.checkpoint.ids import EOS
from export.checkpoint.tokenizer import GENERATION, special_id


def united(config: ModelConfig, directory: Path, family: Family, raw: dict[str, Any]) -> ModelConfig:
    """`config` with the ends of generation_config.json and of a turn, and the padding id of config.json's keys `raw`.

    Raises CheckpointError for an end in generation_config.json that is no id of
    the vocabulary, and for a mask that ends an answer.
    """
    declared = generation_config(directory).get(EOS)
    listed = declared if isinstance(declared, list) else [] if declared is None else [declared]
    for token in listed:
        if type(token) is not int or not 0 <= token < config.vocab or token == config.mask_id:
            raise CheckpointError(
                f"{directory / GENERATION}: {EOS} is {json.dumps(declared)}, expected ids below {config.vocab} "
                f"other than the mask's {config.mask_id}; correct it"
            )
    named = {text: special_id(directory, text) for text in (family.end_of_turn, *family.ends)}
    for text, number in named.items():
        if number == config.mask_id:
            raise CheckpointError(
                f"{directory}: {text}, which ends an answer, has the id {number} of the mask; correct mask_token_id"
            )
    eot = named.pop(family.end_of_turn)
    others = (*config.more_ends, *listed, *(number for number in named.values() if number is not None))
    more = dict.fromkeys(token for token in others if token not in (config.eos_id, eot))
    pad = raw.get("pad_token_id")
    known = type(pad) is int and 0 <= pad < config.vocab
    return replace(config, eot_id=eot, more_ends=tuple(more), pad_id=pad if known else None)
