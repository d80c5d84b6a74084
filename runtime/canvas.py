"""A canvas: text with holes that the model fills where they are, whatever stands behind them.

    {"name": "{{name:8:string}}", "age": {{age:3:integer}}, "sex": "{{sex:choice:female|male}}"}

A hole is `{{name:size}}`, its size in tokens, or `{{name:size:type}}` with the type `text` (the default), `string`
(what may stand in a JSON string) or `integer` (digits, the first of several no zero); `{{name:choice:a|b}}` is one of
its texts, and as long as the longest. `{{{{` writes `{{`; all other text is itself, a mask token's too. The model may
fill a hole short, with an end.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.errors import PromptError
from runtime.decoding.generate import Output
from runtime.decoding.holes import Canvas, Hole, Ids
from runtime.decoding.sequence import Positions
from runtime.decoding.stops import Decode
from runtime.text import Text

TYPES = ("text", "string", "integer")
HOLE = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
DROPPED = "text", "ids", "ended", "tokens", "tokens_per_second", "eos_at"  # of an answer, not of holes
DIGITS = re.compile("[0-9]+")
DOUBLED = "\ufdd0"  # no character: stands for doubled braces while holes are looked for
SYNTAX = "write {{name:24}}, {{name:3:integer}} or {{name:choice:yes|no}}, and {{{{ for two braces of the text"


@dataclass(frozen=True)
class Field:
    """A hole as it is written: its size in tokens (0: that of the longest choice), its type and choices."""

    name: str
    size: int
    kind: str = "text"
    choices: tuple[str, ...] = ()

    @classmethod
    def read(cls, inside: str) -> "Field":
        """The hole `{{inside}}`; raises PromptError for one that cannot be read."""
        name, _, rest = inside.partition(":")
        size, _, kind = rest.partition(":")
        if name.strip() and size == "choice" and kind:
            choices = tuple(kind.split("|"))
            if all(choices) and len(set(choices)) == len(choices):
                return cls(name.strip(), 0, "choice", choices)
        elif name.strip() and size.strip().isdigit() and 0 < int(size) < 10**6 and (kind or "text") in TYPES:
            return cls(name.strip(), int(size), kind or "text")
        raise PromptError(f"the canvas has a hole {{{{{inside[:60]}}}}} that cannot be read; {SYNTAX}")

    def holds(self, text: str) -> bool:
        """Whether a text is one of the hole's type."""
        if self.kind == "integer":
            return re.fullmatch("0|[1-9][0-9]*", text) is not None
        if self.kind == "choice":
            return text in self.choices
        return self.kind == "text" or not re.search(r'["\\\x00-\x1f]', text)


@dataclass(frozen=True)
class Filled:
    """A canvas with its holes filled.

    `text` is the whole text, `holes` the text of each by name; `ended` says for each
    whether an end closed it (`eos`) or all its masks were filled (`length`), `failed`
    names those whose text is not of their type, and `tokens` counts those of all
    holes. `output` has steps, times and the ids of the whole sequence.
    """

    text: str
    holes: dict[str, str]
    ended: dict[str, str]
    failed: tuple[str, ...]
    tokens: int
    output: Output

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        rest = {name: value for name, value in self.output.to_json().items() if name not in DROPPED}
        return {
            "text": self.text, "holes": self.holes, "ended": self.ended, "failed": list(self.failed),
            "tokens": self.tokens,
        } | rest  # fmt: skip


def parts(canvas: str) -> list[str | Field]:
    """Text and holes in their order; raises PromptError for a canvas without holes, or one that cannot be read."""
    text, found, at = canvas.replace("{{{{", DOUBLED), list[str | Field](), 0
    for match in HOLE.finditer(text):
        found += [text[at : match.start()], Field.read(match[1])]
        at = match.end()
    found.append(text[at:])
    names = [part.name for part in found if isinstance(part, Field)]
    if not names or any("{{" in part for part in found if isinstance(part, str)):
        raise PromptError(f"the canvas has {'no hole' if not names else '{{ without }} behind it'}; {SYNTAX}")
    if doubled := [name for name in names if names.count(name) > 1]:
        raise PromptError(f"the canvas has several holes called {doubled[0]!r}; give each a name of its own")
    return [part.replace(DOUBLED, "{{") if isinstance(part, str) else part for part in found]


def escaped(text: str) -> str:
    """The canvas whose text is `text`, without holes."""
    return text.replace("{{", "{{{{")


def edited(text: Text, source: str, spans: Sequence[tuple[int, int]]) -> str:
    """The canvas in which the characters of each span (start, end) are a hole of as many tokens, named by its number.

    Raises PromptError for spans that overlap or leave the text.
    """
    at, pieces = 0, []
    for number, (start, end) in enumerate(sorted(spans), 1):
        if not at <= start < end <= len(source):
            raise PromptError(
                f"the span {start}:{end} is empty, overlaps another or leaves the text of {len(source)} characters; "
                "give spans (start, end) within it"
            )
        pieces += [escaped(source[at:start]), f"{{{{{number}:{len(text.literal(source[start:end]))}}}}}"]
        at = end
    return "".join([*pieces, escaped(source[at:])])


class Form:
    """A canvas as ids with masks, and what the holes become when they are filled.

    `parts` are its text and holes, `ids` [P] those of the sequence, `canvas` its holes.
    """

    def __init__(self, parts: list[str | Field], ids: Positions, holes: list[Hole]):
        self.parts, self.ids, self.canvas = parts, ids, Canvas(holes)
        self.fields = [part for part in parts if isinstance(part, Field)]

    @classmethod
    def of_text(cls, text: Text, canvas: str, prompt: Any, mask_id: int, ends: tuple[int, ...]) -> "Form":
        """A canvas in text: with a `prompt` the assistant's answer, else plain text, begun as the tokenizer begins one.

        Fixed text is encoded piece by piece. Raises PromptError for a canvas that cannot be read.
        """
        found, holes = parts(canvas), []
        pieces: list[Positions] = [text.start if prompt is None else text.prompt(prompt)]
        for part in found:
            if isinstance(part, str):
                pieces.append(text.literal(part))
            else:
                holes.append(made(text, part, sum(map(len, pieces)), ends))
                pieces.append(np.full(holes[-1].length, mask_id))
        return cls(found, np.concatenate(pieces), holes)

    @classmethod
    def of_ids(cls, ids: Positions, mask_id: int) -> "Form":
        """Ids [P] with masks: each run of masks is a hole, named by its number from 1."""
        masks = np.flatnonzero(ids == mask_id)
        runs = np.split(masks, np.flatnonzero(np.diff(masks) > 1) + 1) if len(masks) else []
        holes = [Hole(str(number), int(run[0]), len(run)) for number, run in enumerate(runs, 1)]
        return cls([Field(hole.name, hole.length) for hole in holes], ids, holes)

    def filled(self, output: Output, ends: tuple[int, ...], decode: Decode) -> Filled:
        """What the holes became; of a canvas of ids the text is that of all ids."""
        ids = np.array(output.sequence)
        inside, ended = {}, {}
        for hole in self.canvas.holes:
            own = ids[hole.start : hole.start + hole.length]
            found = np.flatnonzero(np.isin(own, ends))
            inside[hole.name], ended[hole.name] = (
                own[: found[0]] if len(found) else own,
                "eos" if len(found) else "length",
            )
        texts = {name: decode(own) for name, own in inside.items()}
        if any(isinstance(part, str) for part in self.parts):
            whole = "".join(part if isinstance(part, str) else texts[part.name] for part in self.parts)
        else:
            whole = decode(ids)
        failed = tuple(field.name for field in self.fields if not field.holds(texts[field.name]))
        return Filled(whole, texts, ended, failed, sum(map(len, inside.values())), output)


def made(text: Text, field: Field, start: int, ends: tuple[int, ...]) -> Hole:
    """The hole of a field at a position, with the ids that it may take; raises PromptError where no token fits."""
    if field.kind == "choice":
        choices = [text.literal(choice).tolist() for choice in field.choices]
        length = max(map(len, choices))
        ids: tuple[Ids, ...] = tuple((*choice, *[ends[0]] * (length - len(choice))) for choice in choices)
        return Hole(field.name, start, length, choices=ids)
    if field.kind == "text":
        return Hole(field.name, start, field.size)
    pieces = [piece or "" for piece in text.pieces]
    integer = field.kind == "integer"
    fitting = np.array([bool(DIGITS.fullmatch(piece) if integer else piece and field.holds(piece)) for piece in pieces])
    if not fitting.any():
        raise PromptError(f"the tokenizer has no token for the {field.kind} {field.name!r}; make the hole a text")
    allowed = fitting.copy()
    allowed[list(ends)] = True
    if not integer:
        return Hole(field.name, start, field.size, allowed)
    fitting &= [field.holds(piece) and (field.size == 1 or piece != "0") for piece in pieces]
    return Hole(field.name, start, field.size, allowed, first=fitting)
