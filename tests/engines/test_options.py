"""Options as dataclass fields: their types, ranges, arguments and keywords."""

import argparse
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from engines.errors import OptionError
from engines.options import UNSET, add_argument, check_options, document_keywords, option, options_of, within
from tests.support.cases import refused


@dataclass(frozen=True)
class Sample:
    """One option of each kind."""

    size: int = option(4, "a size", low=1, high=8, reason="slots")
    rate: float = option(0.5, "a rate", low=0, high=1, above=True, reason="a probability")
    heat: float = option(0.0, "a temperature", low=0.0)
    limit: int | None = option(None, "a limit", low=1)
    kind: str = option("row", "a kind", choices=("row", "head"))
    note: str | None = option(None, "a text")
    fast: bool = option(True, "a switch")
    plain: int = 0  # not an option


def test_fields_become_options() -> None:
    found = options_of(Sample)
    assert list(found) == ["size", "rate", "heat", "limit", "kind", "note", "fast"]
    assert (found["limit"].type, found["limit"].optional, found["limit"].default) == (int, True, None)
    assert (found["rate"].type, found["rate"].optional, found["rate"].flag) == (float, False, "--rate")


@pytest.mark.parametrize(
    ("values", "words"),
    [({"size": 0}, "size must lie in 1 … 8 (slots), got 0"), ({"size": 9}, "size must lie in 1 … 8 (slots), got 9"),
     ({"size": 2.0}, "got 2.0"), ({"size": True}, "got True"), ({"size": None}, "got None"), ({"size": "4"}, "got 4"),
     ({"rate": 0.0}, "rate must lie in (0, 1] (a probability), got 0.0"), ({"rate": float("nan")}, "got nan"),
     ({"heat": -0.1}, "heat must be a number from 0 up, got -0.1"), ({"heat": float("inf")}, "got inf"),
     ({"limit": 0}, "limit must be a whole number from 1 up, got 0"),
     ({"kind": "col"}, "kind must be one of row, head, got 'col'"), ({"kind": None}, "got None"),
     ({"note": 3}, "note must be text, got 3"), ({"fast": 1}, "fast must be true or false, got 1")],
)  # fmt: skip
def test_values_are_checked(values: dict[str, Any], words: str) -> None:
    with refused(OptionError, words):
        check_options(Sample(**values))


def test_values_that_are_allowed() -> None:
    check_options(Sample())
    numbers: dict[str, Any] = {"size": np.int64(8), "rate": 1, "heat": np.float32(2), "limit": 10**12}
    check_options(Sample(**numbers, kind="head", note="x", fast=False))


def test_bounds_that_are_known_later() -> None:
    check_options(Sample(size=5), {"size": (5, "the bundle")})
    with refused(OptionError, "size must lie in 1 … 4 (the bundle), got 5"):
        check_options(Sample(size=5), {"size": (4, "the bundle")})
    within("steps", 3, 1, 3, "steps")
    with refused(OptionError, "share must lie in 0.0 … 1.0 (a fraction), got 2"):
        within("share", 2, 0.0, 1.0, "a fraction")


def parsed(*argv: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(exit_on_error=False)
    for about in options_of(Sample).values():
        add_argument(parser, about)
    return vars(parser.parse_args(argv))


def test_arguments() -> None:
    """An argument that is not given is missing; `none` is a value where None is one."""
    assert parsed() == {}
    assert parsed("--size", "3", "--rate", "0.25", "--no-fast") == {"size": 3, "rate": 0.25, "fast": False}
    wanted = {"limit": None, "note": None, "kind": "head"}
    assert parsed("--limit", "none", "--note", "none", "--kind", "head") == wanted
    for argv, words in (
        (("--size", "none"), "invalid int value: 'none'"), (("--limit", "x"), "invalid int or none value: 'x'"),
        (("--kind", "col"), "invalid choice: 'col'"),
    ):  # fmt: skip
        with pytest.raises(argparse.ArgumentError, match=words):
            parsed(*argv)


def test_the_help_shows_defaults() -> None:
    parser = argparse.ArgumentParser()
    for about in options_of(Sample).values():
        add_argument(parser, about, "the bundle's" if about.name == "size" else None)
    text = " ".join(parser.format_help().split())
    for words in ("a size (default: the bundle's)", "a limit (default: none)", "a switch (default: on)"):
        assert words in text


def test_keywords_are_documented() -> None:
    def call(prompt: str, **options: Any) -> None:
        """Does nothing."""

    document_keywords(call, Sample)
    signature = inspect.signature(call)
    assert list(signature.parameters) == ["prompt", *options_of(Sample)]
    limit = signature.parameters["limit"]
    assert limit.kind is limit.KEYWORD_ONLY and limit.default is UNSET and limit.annotation == int | None
