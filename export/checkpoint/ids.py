"""The ids of the mask and of EOS, from wherever a published directory or the user names them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines.errors import CheckpointError
from export.checkpoint import Family
from export.checkpoint.config_keys import FLAGS
from export.checkpoint.generation import generation_config
from export.checkpoint.tokenizer import special_id

MASK, EOS = "mask_token_id", "eos_token_id"  # keys of config.json


def complete(directory: Path, family: Family, raw: dict[str, Any], given: Mapping[str, int]) -> dict[str, Any]:
    """The keys of config.json, with the `MASK` and `EOS` that it does not name.

    EOS is that of generation_config.json, the mask that of the tokenizer, else both
    are `given` (key -> id) or, within the vocabulary, the family's published ones. Raises CheckpointError for
    an id that is given where the files name another.
    """
    found = {EOS: generation_config(directory).get(EOS), MASK: special_id(directory, family.mask)}
    named: dict[str, Any] = {key: raw[key] if raw.get(key) is not None else value for key, value in found.items()}
    for key, number in given.items():
        declared = named[key] if isinstance(named[key], list) else [named[key]]
        if named[key] is not None and number not in declared:
            raise CheckpointError(
                f"{directory}: {key} is {json.dumps(named[key])} there, and {FLAGS[key]} {number} is another; "
                f"leave {FLAGS[key]} out"
            )
    vocab = raw.get("vocab_size")
    published = {key: number for key, number in family.ids.items() if type(vocab) is int and number < vocab}
    return {**raw, **published, **given, **{key: value for key, value in named.items() if value is not None}}
