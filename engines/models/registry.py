"""Which family a config.json belongs to: the only place that asks.

Add a family by writing its file and naming it in `FAMILIES`. Nothing here knows
what the keys of a config mean beyond `model_type` and `architectures`.
"""

from typing import Any

from engines.errors import CheckpointError
from engines.models import Family
from engines.models.llada import LLADA

FAMILIES: tuple[Family, ...] = (LLADA,)


def find_family(raw: dict[str, Any]) -> Family:
    """The family of the config `raw`; raises CheckpointError, listing the known ones, if there is none.

    Both keys count: other architectures are published under the same `model_type`.
    A config without `architectures` is judged by its `model_type` alone.
    """
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    for family in FAMILIES:
        named = architectures is None or architectures in [[name] for name in family.architectures]
        if model_type == family.model_type and named:
            return family
    known = "; ".join(f"{f.name}: {f.model_type!r} with {' or '.join(f.architectures)}" for f in FAMILIES)
    raise CheckpointError(
        f"config.json: no family has model_type {model_type!r} with architectures {architectures!r}; "
        f"use a checkpoint of a known family ({known})"
    )
