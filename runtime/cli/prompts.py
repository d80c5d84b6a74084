"""Prompts from files and standard input, and the file of their answers.

Whatever the locale, text is UTF-8: a byte order mark at its start is dropped, and a line ends at a line feed (with a
carriage return before it or not), and at nothing else. A file of prompts has one a line. Where its name ends in .jsonl
or its first line is such an object, each line is a JSON object: `prompt` (a text) or `messages` or `prompt_ids`, an
`id` of any kind that the answer repeats, and decoding options of this prompt.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from engines.errors import OptionError, PromptError
from engines.files import write_atomically, writing
from engines.options import from_shell
from runtime.api import Runtime
from runtime.cli.options import option_names
from runtime.decoding.generate import Output

STDIN = "-"
BOM = b"\xef\xbb\xbf"
WIDE = (b"\xff\xfe", b"\xfe\xff")  # of UTF-16
KINDS = {  # what a JSON object has of: its values as messages call them, and the type of a list's elements
    "prompt": ("a text", None), "messages": ("a list of objects", dict), "prompt_ids": ("a list of ids", int),
}  # fmt: skip


def read_bytes(source: str | Path) -> bytes:
    """The content of a file, or of standard input for `-`, without a byte order mark; raises PromptError."""
    try:
        raw = _standard_input() if str(source) == STDIN else Path(source).read_bytes()
    except OSError as error:
        raise PromptError(f"cannot read prompts from {source} ({error.strerror}); check the path") from error
    if raw.startswith(WIDE):
        raise PromptError(f"{named(source)} is UTF-16, expected UTF-8; save it as UTF-8")
    return raw.removeprefix(BOM)


def _standard_input() -> bytes:
    if sys.stdin is None or sys.stdin.closed:
        raise PromptError("standard input is closed and no prompt can be read from it; give one with --prompt TEXT")
    try:
        binary = getattr(sys.stdin, "buffer", None)
        return bytes(binary.read()) if binary else sys.stdin.read().encode("utf-8", "surrogateescape")
    except OSError as error:
        raise PromptError(
            f"standard input cannot be read ({error.strerror}); give the prompt with --prompt TEXT"
        ) from error


def named(source: str | Path) -> str:
    """How messages call a source of prompts."""
    return "standard input" if str(source) == STDIN else str(source)


def read_prompt(text: str | None, ids: Path | None) -> Any:
    """A prompt's text, that of standard input for `-`, or the ids of a file; raises PromptError."""
    if ids is not None:
        return read_ids(ids)
    if text != STDIN:
        return None if text is None else from_shell(text)
    try:
        read = read_bytes(STDIN).decode()
    except UnicodeError as error:
        raise PromptError(f"standard input is not text ({error}); save the prompt as UTF-8") from error
    return read.removesuffix("\n").removesuffix("\r")  # the newline is the shell's


def read_ids(path: Path) -> Any:
    """The ids in a file: a JSON list, or numbers separated by space; raises PromptError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        return json.loads(text) if text.lstrip().startswith("[") else [int(word) for word in text.split()]
    except (OSError, ValueError, RecursionError) as error:
        raise PromptError(f"cannot read ids from {path} ({error}); write them as [1, 2, 3]") from error


@dataclass(frozen=True)
class Asked:
    """A prompt of a file: its number from 1, its line, and what the line says, or the `error` that it is."""

    number: int
    line: int
    prompt: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    id: Any = None
    error: str | None = None

    def key(self, *about: Any) -> str:
        """What its answer depends on, as 16 hexadecimal digits."""
        content = [self.number, self.id, self.prompt, dict(self.options), self.error, *about]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_prompts(source: str | Path) -> list[Asked]:
    """The prompts of a file, or of standard input for `-`; blank lines are none.

    A line that is no prompt has its error. Raises PromptError for a file that cannot be read or has no prompt.
    """
    lines = [(at, line) for at, line in enumerate(read_bytes(source).split(b"\n"), 1) if line.strip()]
    if not lines:
        raise PromptError(f"{named(source)} holds no prompt; write one a line")
    first = _json(lines[0][1])
    as_json = str(source).endswith(".jsonl") or (isinstance(first, dict) and not KINDS.keys().isdisjoint(first))
    return [asked(number, at, line.removesuffix(b"\r"), as_json) for number, (at, line) in enumerate(lines, 1)]


def read_lines(source: str | Path) -> list[Any]:
    """The prompts of a file: texts, messages or ids; raises PromptError for the first line that is none."""
    found = read_prompts(source)
    for one in found:
        if one.error is not None:
            raise PromptError(f"{named(source)}, line {one.line}: {one.error}")
    return [one.prompt for one in found]


def _json(line: bytes) -> Any:
    with suppress(ValueError, RecursionError):
        return json.loads(line)


def asked(number: int, at: int, line: bytes, as_json: bool) -> Asked:
    """The prompt in a line."""
    try:
        text = line.decode()
    except UnicodeError as error:
        return Asked(number, at, error=f"the prompt is not text ({error}); save it as UTF-8")
    if not as_json:
        return Asked(number, at, text)
    content = _json(line)
    kinds = [kind for kind in KINDS if isinstance(content, dict) and kind in content]
    if len(kinds) != 1:
        return Asked(number, at, error=f"the line is no JSON object with one of {', '.join(KINDS)}; write it as such")
    (kind,) = kinds
    own, value = {name: content[name] for name in content if name not in (kind, "id")}, content[kind]
    what, element = KINDS[kind]
    fine = isinstance(value, str) if element is None else isinstance(value, list) and {*map(type, value)} <= {element}
    wrong = None if fine else f"{kind} is not {what}; write it as one"
    if unknown := sorted(own.keys() - option_names() - {"policy"}):
        wrong = f"there is no option {unknown[0]}; leave it out, or see `python -m runtime generate --help`"
    if not isinstance(own.get("policy", ""), str):
        wrong = "policy is not a text; give a policy's name"
    return Asked(number, at, value, own, content.get("id"), wrong)


def answers(
    model: Runtime, prompts: list[Asked], policy: str | None, options: Mapping[str, Any]
) -> Iterator[tuple[Asked, Output | str]]:
    """The answer to each prompt in order, or the sentence that refuses it.

    Prompts with the same options are decoded side by side, as many as the bundle was built for.
    """
    size = model.bundle.capacity.max_batch
    for (error, own), group in groupby(prompts, lambda one: (one.error, dict(one.options))):
        alike, given = list(group), {"policy": policy} | dict(options) | own
        for start in range(0, len(alike), size):
            batch = alike[start : start + size]
            if error is not None:
                yield from ((one, error) for one in batch)
                continue
            outs: list[Output | str] = []
            try:
                outs += model.generate_batch([one.prompt for one in batch], **given)
            except (PromptError, OptionError):  # nothing ran: requests are checked before the first step
                outs += [answer(model, one, given) for one in batch]
            yield from zip(batch, outs, strict=True)


def answer(model: Runtime, one: Asked, given: Mapping[str, Any]) -> Output | str:
    """The answer to one prompt, or the sentence that refuses it."""
    try:
        return model.generate(one.prompt, **given)
    except (PromptError, OptionError) as error:
        return str(error)


class Results:
    """A file of answers, one JSON line each, written as they come; `path` None: none is kept.

    Each line has the `key` of its prompt. With `resume` the lines of an earlier run are kept, but for errors and a last
    line that was cut short. Raises OptionError for a file that exists without `resume`, or holds something else.
    """

    def __init__(self, path: Path | None, resume: bool = False):
        if resume and path is None:
            raise OptionError("--resume goes on where a file of answers ends; name the file with --out")
        self.path = path
        self.done: set[str] = set()
        self.file: TextIO | None = None
        if path is not None and path.exists():
            self._take_up(path, resume)

    def _take_up(self, path: Path, resume: bool) -> None:
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except OSError as error:
            raise OptionError(f"cannot read {path} ({error.strerror}); choose another --out") from error
        if lines and not resume:
            raise OptionError(f"{path} exists; give --resume to go on where it ends, or choose another --out")
        whole = [line for line in lines if line.endswith(b"\n")]
        kept = [(line, content) for line in whole if (content := _record(line, path)).get("error") is None]
        self.done = {content["key"] for _, content in kept}
        if len(kept) < len(lines):
            with writing(path, "choose another --out"):
                write_atomically(path, b"".join(line for line, _ in kept))

    def expect(self, keys: set[str]) -> None:
        """Raise OptionError if the file holds the answer of a prompt that has none of `keys`."""
        if self.done - keys:
            raise OptionError(f"{self.path} holds answers to other prompts, options or bundles; choose another --out")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a line; raises OptionError if the file cannot be written."""
        if self.path is not None:
            with writing(self.path, "choose another --out"):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = self.file or self.path.open("a", encoding="utf-8")
                print(json.dumps(record), file=self.file, flush=True)

    def close(self) -> None:
        """Close the file; every line was flushed when it was written."""
        if self.file is not None:
            with suppress(OSError):
                self.file.close()


def _record(line: bytes, path: Path) -> dict[str, Any]:
    content = _json(line)
    if not isinstance(content, dict) or not isinstance(content.get("key"), str):
        raise OptionError(f"{path} holds something other than answers; choose another --out")
    return content
