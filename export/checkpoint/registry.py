"""The families, and the one a config.json belongs to.

Every module of `families` defines one as `FAMILY`; to add a family, add its file.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

from engines.errors import CheckpointError
from export.checkpoint import Family, families


def known() -> Iterator[Family]:
    """All families, by the names of their files."""
    for name in sorted(module.name for module in pkgutil.iter_modules(families.__path__)):
        family = importlib.import_module(f"{families.__name__}.{name}").FAMILY
        assert isinstance(family, Family)
        yield family


def find_family(raw: dict[str, Any]) -> Family:
    """The family of the config `raw`; raises CheckpointError with a list of the families if there is none.

    Both keys count: other architectures are published under the same `model_type`.
    Without `architectures` the `model_type` alone decides.
    """
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    found = list(known())
    for family in found:
        named = architectures is None or architectures in [[name] for name in family.architectures]
        if model_type == family.model_type and named:
            return family
    listed = "; ".join(f"{f.name}: {f.model_type!r} with {' or '.join(f.architectures)}" for f in found)
    raise CheckpointError(
        f"config.json: no family has model_type {model_type!r} with architectures {architectures!r}; "
        f"use a checkpoint of a known family ({listed})"
    )
