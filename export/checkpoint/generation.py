"""Decoding defaults of a checkpoint: its generation_config.json over the defaults of its family."""

import json
from pathlib import Path
from typing import Any

from engines.errors import CheckpointError
from export.checkpoint import Family
from export.checkpoint.tokenizer import AGAIN

SCHEDULE = "alg", "alg_temp", "eps"  # keys of generation_config.json itself, as published drivers read them
WINDOW: dict[str, Any] = {"window": 16}  # where neither the family nor the checkpoint has one


def decoding_defaults(directory: Path, family: Family) -> dict[str, Any]:
    """The decoding options that a bundle of the checkpoint has as defaults; `window` is always among them.

    The object `elastic` of generation_config.json is taken as it is: the runtime,
    which has the options, checks its names when it loads the bundle. Raises
    CheckpointError for a generation_config.json that is no JSON object.
    """
    path = directory / "generation_config.json"
    found: dict[str, Any] = {}
    if path.is_file():
        try:
            content = json.loads(path.read_text())
            found = dict(content.get("elastic", {}))
            found |= {name: content[name] for name in SCHEDULE if content.get(name) is not None}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{path} is no JSON object of generation defaults ({error}); {AGAIN}") from error
    return WINDOW | dict(family.decoding) | found
