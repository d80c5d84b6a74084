"""Reading a config.json strictly: every key is read, has one value, is harmless, or is refused by name.

An absent key counts as null.
"""

import json
import sys
from collections.abc import Collection, Mapping
from typing import Any

from engines.errors import CheckpointError


def expect(holds: bool, key: str, value: Any, wanted: str) -> None:
    """Raise CheckpointError unless `holds`: `key` has `value` where `wanted` is needed."""
    if not holds:
        raise CheckpointError(
            f"config.json: {key} is {json.dumps(value)}, expected {wanted}; "
            "correct it, or use a checkpoint this family implements"
        )


class Keys:
    """The keys of a config.json that are not null: names are checked at construction, values when they are read.

    `required` and `optional` keys are read, `fixed` ones have one implemented
    value, `harmless` ones do not change a forward pass. Raises CheckpointError for
    any other key, and for a required one that is missing or null.
    """

    def __init__(
        self, family: str, raw: dict[str, Any], required: Collection[str], optional: Collection[str],
        fixed: Mapping[str, Any], harmless: Collection[str],
    ) -> None:  # fmt: skip
        self.values = {key: value for key, value in raw.items() if value is not None}
        unknown = sorted(set(self.values) - set(harmless) - fixed.keys() - {*required, *optional})
        missing = [key for key in required if key not in self.values]
        if unknown:
            listed = ", ".join(f"{key} = {json.dumps(self.values[key])}" for key in unknown)
            raise CheckpointError(
                f"config.json: the family {family} does not implement {listed}; "
                "remove the key if it does not change what the model computes"
            )
        if missing:
            raise CheckpointError(
                f"config.json: {', '.join(missing)} missing or null; take them from the model's published config"
            )
        for key, value in fixed.items():
            came = self.values.get(key, value)
            expect(type(came) is type(value) and came == value, key, came, json.dumps(value))

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value: Any = self.values.get(key, default)
        expect(type(value) is int and value > 0, key, value, "a positive integer")
        return int(value)

    def token(self, key: str, vocab: int) -> int:
        """A token id below `vocab`."""
        value = self.values[key]
        expect(type(value) is int and 0 <= value < vocab, key, value, f"an id below vocab_size ({vocab})")
        return int(value)

    def tokens(self, key: str, vocab: int) -> tuple[int, ...]:
        """One token id below `vocab`, or a list of some; each once, in their order."""
        value = self.values[key]
        listed = value if isinstance(value, list) else [value]
        fine = bool(listed) and all(type(token) is int and 0 <= token < vocab for token in listed)
        expect(fine, key, value, f"an id below vocab_size ({vocab}), or a list of such ids")
        return tuple(dict.fromkeys(listed))

    def number(self, key: str) -> float:
        """A positive number."""
        value = self.values[key]
        positive = type(value) in (int, float) and 0 < value <= sys.float_info.max
        expect(positive, key, value, "a positive number")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """A boolean."""
        value = self.values.get(key, default)
        expect(type(value) is bool, key, value, "true or false")
        return bool(value)
