"""Decoding defaults of a checkpoint: its generation_config.json over the defaults of its family."""

import json
from pathlib import Path
from typing import Any

from engines.errors import CheckpointError
from export.checkpoint import Family
from export.checkpoint.files import AGAIN
from export.checkpoint.tokenizer import GENERATION

SCHEDULE = "alg", "alg_temp", "eps"  # keys of generation_config.json itself, as published drivers read them
WINDOW: dict[str, Any] = {"window": 16}  # where neither the family nor the checkpoint has one


def decoding_defaults(directory: Path, family: Family) -> dict[str, Any]:
    """The decoding options that a bundle of the checkpoint has as defaults; `window` is always among them.

    The object `elastic` of generation_config.json is taken as it is: the runtime,
    which has the options, checks its names when it loads the bundle. Raises
    CheckpointError for a generation_config.json that is no JSON object.
    """
    content = generation_config(directory)
    try:
        found = dict(content.get("elastic", {}))
    except (ValueError, TypeError) as error:
        raise refusal(directory, error) from error
    found |= {name: content[name] for name in SCHEDULE if content.get(name) is not None}
    return WINDOW | dict(family.decoding) | found


def generation_config(directory: Path) -> dict[str, Any]:
    """The content of generation_config.json, {} without one; raises CheckpointError for one that is no JSON object."""
    path = directory / GENERATION
    if not path.is_file():
        return {}
    try:
        return {**json.loads(path.read_text(encoding="utf-8-sig"))}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise refusal(directory, error) from error


def refusal(directory: Path, error: Exception) -> CheckpointError:
    """The error for a generation_config.json that cannot be used."""
    return CheckpointError(f"{directory / GENERATION} is no JSON object of generation defaults ({error}); {AGAIN}")
