"""Stop strings: where they end an answer, in its ids as in its text."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Protocol

from runtime.decoding.sequence import Positions


class Decode(Protocol):
    """Turns ids [n] into text; with `special` the special tokens among them are written out."""

    def __call__(self, ids: Positions, special: bool = False) -> str: ...


def complete(ids: Positions, decode: Decode, stops: Sequence[str]) -> bool:
    """Whether the text of `ids` [n], with or without its special tokens, holds one of the strings."""
    return any(stop in text for text in (decode(ids), decode(ids, special=True)) for stop in stops)


def cut(ids: Positions, decode: Decode, stops: Sequence[str]) -> tuple[Positions, str]:
    """The text of `ids` [n] before the first stop string, and the fewest of the ids that hold this text.

    A special token counts as its text while the stops are looked for; the text
    that is returned has none. A token that the stop begins within is kept.
    """
    surplus = ""
    for special in (True, False):
        text = decode(ids, special=special).removesuffix(surplus)
        head = before(text, stops)
        if head != text:
            ids = ids[: fewest(ids, decode, special, head)]
            surplus = decode(ids, special=special)[len(head) :]
    return ids, decode(ids).removesuffix(surplus)


def before(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the strings."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def fewest(ids: Positions, decode: Decode, special: bool, head: str) -> int:
    """How many of `ids` [n] have a text that begins with `head`, as all of them do."""
    return bisect_left(range(len(ids)), True, key=lambda n: decode(ids[:n], special=special).startswith(head))
