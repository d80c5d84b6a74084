"""Text in and out: the bundle's tokenizer and its chat template.

Templates come with checkpoints and are code of strangers: they render in
Jinja's sandbox, without a loader. Ids are all the rest of the runtime sees.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from engines.bundle import Bundle
from engines.errors import BundleError, PromptError
from runtime.sequence import Positions


class Text:
    """Encodes prompts and decodes answers for one bundle."""

    def __init__(self, bundle: Bundle):
        self.bundle = bundle

    @cached_property
    def tokenizer(self) -> Tokenizer:
        path = self._file("tokenizer.json")
        if path is None:
            raise BundleError(f"{self.bundle.root} has no tokenizer.json; give ids with --prompt-ids")
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise BundleError(f"{path} is not a tokenizer this installation reads ({error})") from error

    @cached_property
    def settings(self) -> dict[str, Any]:
        path = self._file("tokenizer_config.json")
        content = json.loads(path.read_text()) if path else {}
        # Special tokens may be written as objects with the text under "content".
        return {k: v["content"] if isinstance(v, dict) and "content" in v else v for k, v in content.items()}

    @property
    def template(self) -> str | None:
        path = self._file("chat_template.jinja")
        found = path.read_text() if path else self.settings.get("chat_template")
        if isinstance(found, list):
            found = next((t["template"] for t in found if t.get("name") == "default"), None)
        return found

    def _file(self, name: str) -> Path | None:
        return self.bundle.file(name) if name in self.bundle.manifest.files else None

    def encode(self, text: str) -> Positions:
        """Text to ids [P], special tokens in the text recognised, none added."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, ids: Positions) -> str:
        """Ids to text, special tokens left out."""
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)

    def prompt(self, messages: str | list[dict[str, str]]) -> Positions:
        """Ids of a user's text, or of messages {"role", "content"}, through the chat template.

        A checkpoint without a template (a base model) takes the plain text.
        Raises PromptError for empty text or a template that fails.
        """
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        if not turns or not turns[-1]["content"].strip():
            raise PromptError("the prompt is empty; give some text")
        if self.template is None:
            return self.encode("\n".join(turn["content"] for turn in turns))
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        tokens = {name: value for name, value in self.settings.items() if name.endswith("_token")}
        try:
            template = environment.from_string(self.template)
            text = template.render(messages=turns, add_generation_prompt=True, **tokens)
        except (TemplateError, TypeError, ValueError, OverflowError) as error:
            raise PromptError(f"the bundle's chat template failed ({error}); give ids with --prompt-ids") from error
        return self.encode(text)


def _refuse(message: str) -> None:
    raise TemplateError(message)
