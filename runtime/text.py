"""Text in and out: the bundle's tokenizer and its chat template.

Templates come with checkpoints and are code of strangers: they render in
Jinja's sandbox, without a loader. Ids are all the rest of the runtime sees.
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
    """Refuses what is unsafe at once: Jinja's own sandbox prints it as nothing, and goes on."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}, which is not allowed")


class Text:
    """Encodes prompts and decodes answers for one bundle."""

    def __init__(self, bundle: Bundle):
        self.bundle = bundle

    @cached_property
    def tokenizer(self) -> Tokenizer:
        path = self._file("tokenizer.json")
        if path is None:
            raise BundleError(
                f"{self.bundle.root} has no tokenizer.json, which text needs; where ids will do, give --prompt-ids"
            )
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(
                f"{path} is not a tokenizer this installation reads ({first_line(error)}); "
                "update the tokenizers package, or give ids with --prompt-ids"
            ) from error

    @cached_property
    def settings(self) -> dict[str, Any]:
        """tokenizer_config.json; special tokens may be objects there, with the text under "content"."""
        try:
            content = json.loads(self._read("tokenizer_config.json") or "{}")
            return {k: v["content"] if isinstance(v, dict) and "content" in v else v for k, v in content.items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise BundleError(
                f"{self.bundle.root}: tokenizer_config.json is not a JSON object ({first_line(error)}); "
                "mend it in the checkpoint and build again"
            ) from error

    @property
    def template(self) -> str | None:
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
            raise BundleError(f"{path} cannot be read ({error}); mend it in the checkpoint and build again") from error

    def _file(self, name: str) -> Path | None:
        return self.bundle.file(name) if name in self.bundle.manifest.files else None

    def encode(self, text: str) -> Positions:
        """Text to ids [P], special tokens in the text recognised, none added."""
        try:
            return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
        except (TypeError, UnicodeError) as error:
            raise PromptError("the prompt is not valid Unicode text; save it as UTF-8") from error

    def decode(self, ids: Positions) -> str:
        """Ids to text, special tokens left out."""
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)

    def prompt(self, messages: str | list[dict[str, str]]) -> Positions:
        """Ids of a user's text, or of messages {"role", "content"}; see `render`."""
        return self.encode(self.render(messages))

    def render(self, messages: str | list[dict[str, str]]) -> str:
        """The text of a prompt: messages through the chat template, behind the model's own system message if there is
        none among them.

        A checkpoint without a template (a base model) takes the plain text.
        Raises PromptError for empty text or a template that fails.
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
        except Exception as error:  # the code of strangers can raise anything
            raise PromptError(
                f"the bundle's chat template failed ({first_line(error)}); give ids with --prompt-ids"
            ) from error


def _refuse(message: str) -> None:
    raise TemplateError(message)


def first_line(error: Exception) -> str:
    """What a foreign error says, in one line; some carry source text or nothing."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__
