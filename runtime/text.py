"""Text in and out: the bundle's tokenizer and its chat template.

The build has made both what transformers reads from the checkpoint (`export.checkpoint.tokenizer`), so that a prompt
has the ids that transformers gives it.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from engines.bundle import Bundle
from engines.errors import BundleError, PromptError
from engines.template import Messages, Template, joined
from runtime.decoding.sequence import Positions

MESSAGE = 'write {"role": "user", "content": "…"}'


class Text:
    """The tokenizer and the chat template of one bundle."""

    def __init__(self, bundle: Bundle):
        self.bundle = bundle

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; raises BundleError if the bundle has none, or one that cannot be read."""
        path = self._file("tokenizer.json")
        if path is None:
            raise BundleError(
                f"{self.bundle.root} has no tokenizer.json, which a text prompt needs; give ids with --prompt-ids"
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(
                f"{path} is not a tokenizer that this installation can read ({first_line(error)}); "
                "update the tokenizers package, or give ids with --prompt-ids"
            ) from error
        tokenizer.encode_special_tokens = bool(self.settings.get("split_special_tokens", False))
        return tokenizer

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The content of tokenizer_config.json: {"special_tokens": {name: text}, "split_special_tokens"}."""
        text = self._read("tokenizer_config.json") or "{}"
        try:
            found: dict[str, Any] = json.loads(text) | {}
            return found
        except (ValueError, TypeError, RecursionError) as error:
            raise BundleError(
                f"{self.bundle.root}: tokenizer_config.json is not a JSON object ({first_line(error)}); "
                "repair the checkpoint and build again"
            ) from error

    @cached_property
    def template(self) -> str | None:
        """The source of the chat template; None for a base model."""
        return self._read("chat_template.jinja")

    @cached_property
    def compiled(self) -> Template | None:
        """The chat template; None for a base model. Raises PromptError for one that is no template."""
        source, tokens = self.template, self.settings.get("special_tokens", {})
        try:
            return None if source is None else Template(source, tokens)
        except Exception as error:  # untrusted code can raise any type
            raise failed(error) from error

    def _read(self, name: str) -> str | None:
        path = self._file(name)
        try:
            return path.read_bytes().decode("utf-8") if path else None
        except (OSError, UnicodeError) as error:
            raise BundleError(f"{path} cannot be read ({error}); repair the checkpoint and build again") from error

    def _file(self, name: str) -> Path | None:
        return self.bundle.file(name) if name in self.bundle.manifest.files else None

    def encode(self, text: str, whole: bool = False) -> Positions:
        """Encode text to ids [P], int64; special tokens in the text are recognised.

        The tokens that the tokenizer puts around a `whole` text, as BOS before it, are added to one that is whole.
        """
        try:
            return np.array(self.tokenizer.encode(text, add_special_tokens=whole).ids, np.int64)
        except (TypeError, UnicodeError) as error:
            raise PromptError("the prompt is not valid Unicode text; save it as UTF-8") from error

    @cached_property
    def _literal(self) -> Tokenizer:
        """The tokenizer, but the text of a special token is text."""
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.encode_special_tokens = True
        return tokenizer

    def literal(self, text: str) -> Positions:
        """Encode a piece of text to ids [P], int64, without special tokens: their text in it is text."""
        try:
            return np.array(self._literal.encode(text, add_special_tokens=False).ids, np.int64)
        except (TypeError, UnicodeError) as error:
            raise PromptError("the canvas is not valid Unicode text; save it as UTF-8") from error

    @cached_property
    def start(self) -> Positions:
        """The ids [n] of the special tokens with which the tokenizer begins a text."""
        encoded = self.tokenizer.encode("a", add_special_tokens=True)
        count = next((n for n, special in enumerate(encoded.special_tokens_mask) if not special), 0)
        return np.array(encoded.ids[:count], np.int64)

    @cached_property
    def pieces(self) -> list[str | None]:
        """The text of each id of the vocabulary by itself; None for special tokens and ids that no token has."""
        special = {number for number, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        known = set(self.tokenizer.get_vocab().values()) - special
        texts = self.tokenizer.decode_batch([[number] for number in range(self.bundle.config.vocab)])
        return [text if number in known else None for number, text in enumerate(texts)]

    def decode(self, ids: Positions, special: bool = False) -> str:
        """Decode ids to text; special tokens are left out unless `special`."""
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=not special)

    def prompt(self, messages: str | Sequence[Mapping[str, Any]]) -> Positions:
        """Encode a user's text, or messages, to ids [P]; see `render`."""
        return self.encode(self.render(messages), whole=self.template is None)

    def render(self, messages: str | Sequence[Mapping[str, Any]]) -> str:
        """Render messages with the chat template to the text of a prompt.

        The model's own system message comes first unless the messages begin with one. Without a template (a base
        model) the text is the messages' content. Raises PromptError for empty text or a template that fails.
        """
        turns = self.messages(messages)
        if self.compiled is None:
            return "\n".join(joined(turn.get("content", "")) for turn in turns)
        try:
            return self.compiled.render(self.compiled.adapted(turns))
        except Exception as error:  # untrusted code can raise any type
            raise failed(error) from error

    def messages(self, prompt: str | Sequence[Mapping[str, Any]]) -> Messages:
        """A user's text, or messages {"role", "content", …}, as messages of plain data, the model's own system first.

        Content is a text or a list of parts {"type": "text", "text": …}; an assistant's may be missing. Keys whose
        value is None are left out, others are kept for the template. Raises PromptError for anything else, and where
        the last message is empty.
        """
        given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        turns = [message(number, turn) for number, turn in enumerate(given, 1)]
        if not turns or not joined(turns[-1].get("content", "")).strip():
            raise PromptError("the prompt is empty; give some text")
        system = self.bundle.config.system
        if system is not None and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": system}, *turns]
        return turns


def message(number: int, turn: Any) -> dict[str, Any]:
    """A message as plain data; `number`, from 1, names it in a PromptError."""
    if not isinstance(turn, Mapping):
        raise PromptError(f"message {number} has no role and content but is a {type(turn).__name__}; {MESSAGE}")
    try:
        found = {key: json.loads(json.dumps(value)) for key, value in turn.items() if value is not None}
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"message {number} is not plain data ({first_line(error)}); {MESSAGE}") from error
    role, content = found.get("role"), found.get("content")
    if not isinstance(role, str) or (content is None and role != "assistant"):
        raise PromptError(f"message {number} lacks its role or content; {MESSAGE}")
    if content is None or isinstance(content, str):
        return found
    if not isinstance(content, list):
        raise PromptError(f"message {number} has content of type {type(content).__name__}, expected text; {MESSAGE}")
    return found | {"content": [part(number, one) for one in content]}


def part(number: int, given: Any) -> dict[str, Any]:
    """A part of a message's content; raises PromptError for one that is no text."""
    if isinstance(given, str):
        return {"type": "text", "text": given}
    if not isinstance(given, dict) or given.get("type") != "text" or not isinstance(given.get("text"), str):
        kind = given.get("type") if isinstance(given, dict) else type(given).__name__
        raise PromptError(
            f"message {number} has a part of type {kind}, expected text; write "
            '{"type": "text", "text": "…"}, and give images with the option images'
        )
    return given


def failed(error: Exception) -> PromptError:
    """The error of a chat template that failed."""
    return PromptError(f"the bundle's chat template failed ({first_line(error)}); give ids with --prompt-ids")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__
