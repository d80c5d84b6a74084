"""Text in and out: the bundle's tokenizer and its chat template.

Chat templates come with checkpoints and are untrusted code: they are rendered in Jinja's sandbox, without a loader.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from engines.bundle import Bundle
from engines.errors import BundleError, PromptError
from runtime.decoding.sequence import Positions


class Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox that raises at the first unsafe access; Jinja's own prints nothing there and continues."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is not allowed")


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
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(
                f"{path} is not a tokenizer that this installation can read ({first_line(error)}); "
                "update the tokenizers package, or give ids with --prompt-ids"
            ) from error

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The content of tokenizer_config.json; a special token that is an object there is replaced by its text."""
        try:
            content = json.loads(self._read("tokenizer_config.json") or "{}")
            return {k: v["content"] if isinstance(v, dict) and "content" in v else v for k, v in content.items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise BundleError(
                f"{self.bundle.root}: tokenizer_config.json is not a JSON object ({first_line(error)}); "
                "repair the checkpoint and build again"
            ) from error

    @property
    def template(self) -> str | None:
        """The source of the chat template: chat_template.jinja, or else the default one of tokenizer_config.json."""
        found = self._read("chat_template.jinja") or self.settings.get("chat_template")
        if isinstance(found, list):
            named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
            found = named.get("default")
        return found

    def _read(self, name: str) -> str | None:
        path = self._file(name)
        try:
            return path.read_text(encoding="utf-8") if path else None
        except (OSError, UnicodeError) as error:
            raise BundleError(f"{path} cannot be read ({error}); repair the checkpoint and build again") from error

    def _file(self, name: str) -> Path | None:
        return self.bundle.file(name) if name in self.bundle.manifest.files else None

    def encode(self, text: str) -> Positions:
        """Encode text to ids [P], int64; special tokens in the text are recognised and none are added."""
        try:
            return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
        except (TypeError, UnicodeError) as error:
            raise PromptError("the prompt is not valid Unicode text; save it as UTF-8") from error

    def decode(self, ids: Positions, special: bool = False) -> str:
        """Decode ids to text; special tokens are left out unless `special`."""
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=not special)

    def prompt(self, messages: str | list[dict[str, str]]) -> Positions:
        """Encode a user's text, or messages {"role", "content"}, to ids [P]; see `render`."""
        return self.encode(self.render(messages))

    def render(self, messages: str | list[dict[str, str]]) -> str:
        """Render messages with the chat template to the text of a prompt.

        The model's own system message comes first unless the messages begin with one. Without a template (a base
        model) the text is the messages' content. Raises PromptError for empty text or a template that fails.
        """
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        for turn in turns:
            if not isinstance(turn, dict) or {type(turn.get(key)) for key in ("role", "content")} != {str}:
                raise PromptError('a message lacks its role or content; write {"role": "user", "content": "…"}')
        if not turns or not turns[-1]["content"].strip():
            raise PromptError("the prompt is empty; give some text")
        system = self.bundle.config.system
        if system is not None and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": system}, *turns]
        source = self.template
        if source is None:
            return "\n".join(turn["content"] for turn in turns)
        environment = Sandbox(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        tokens = {k: v for k, v in self.settings.items() if k.endswith("_token") and v is not None}
        try:
            template = environment.from_string(source)
            return template.render(messages=turns, add_generation_prompt=True, **tokens)
        except Exception as error:  # untrusted code can raise any type
            raise PromptError(
                f"the bundle's chat template failed ({first_line(error)}); give ids with --prompt-ids"
            ) from error


def _refuse(message: str) -> None:
    raise TemplateError(message)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__
