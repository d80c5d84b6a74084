"""What transformers makes of a checkpoint's tokenizer and chat template: one tokenizer.json and one template.

Run in a process of its own, because a template is untrusted code: `python -m export.checkpoint.canonical REQUEST`, with
the JSON object {"folder", "result", "stand_in", "system", "named"}, writes what `read` and `render` return to the file
`result`. Nothing is fetched, and no code of the checkpoint is run as Python. The process ends at a limit of processor
time or memory.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engines import template as templates
from engines.template import WORD, Messages, Template

SECONDS = 5  # of processor time for all templates of a checkpoint
MEMORY = 2 << 30  # bytes beyond those that the process has before it renders
TEXTS = (
    "What is 3 + 4?", " leading, trailing ", "  two\n\nlines\r\n\tand tabs", "naïve café — ∀x ∈ ℝ", "日本語と한국어",
    "🙂👩‍👩‍👧 \u0301e\u200d", "def f(x):\n    return x**2  # 1234567890", "it's DON'T we'll", "", "a<b && c>d '\"\\",
)  # fmt: skip
TURNS: Messages = [
    {"role": "user", "content": WORD},
    {"role": "assistant", "content": "It is “7”. <x>"},
    {"role": "user", "content": "And 日本 & 5?\n"},
]


class Refused(Exception):
    """A tokenizer or template that a bundle cannot have; the message says what came, and the remedy."""


class Clock(datetime):
    """A clock that stands still, so that two renderings have the same time."""

    @classmethod
    def now(cls, tz: Any = None) -> "Clock":
        return cls(2026, 1, 31, 12, 34, 56)


def load(folder: Path, stand_in: str | None) -> Any:
    """The tokenizer that transformers reads from a folder.

    `stand_in` names the class of transformers that takes the place of a class that transformers does not have. Raises
    Refused where one is needed and there is none, and whatever transformers raises.
    """
    import transformers

    settings = content(folder / "tokenizer_config.json")
    declared = settings.get("tokenizer_class") or content(folder / "config.json").get("tokenizer_class")
    code = settings.get("auto_map") or {}
    remote = isinstance(code, list) or "AutoTokenizer" in code
    known = hasattr(transformers, str(declared))
    if not known and stand_in and (declared or remote or not (folder / "tokenizer.json").is_file()):
        reader = getattr(transformers, stand_in)
    elif not known and remote:
        raise Refused(
            f"its class {declared} is code of the checkpoint, which is not run, and its family knows no class of "
            "transformers that equals it; save the tokenizer as a PreTrainedTokenizerFast"
        )
    else:
        reader = transformers.AutoTokenizer
    tokenizer = reader.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        raise Refused(f"a tokenizer of class {type(tokenizer).__name__} has no tokenizer.json; save it as a fast one")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        tokenizer.backend_tokenizer.model.dropout = None  # of training: ids would be drawn at random
    if tokenizer.chat_template is None:  # a processor's file, which a tokenizer does not read
        found = content(folder / "chat_template.json").get("chat_template")
        if isinstance(found, list):
            found = {one["name"]: one["template"] for one in found}
        tokenizer.chat_template = found
    return tokenizer


def content(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def read(tokenizer: Any, folder: Path, named: list[str]) -> dict[str, Any]:
    """The tokenizer as data, its ids compared with transformers' own.

    {"tokenizer": content of tokenizer.json, "tokens": texts of the special tokens by name, "ids": their ids, "named":
    ids of the tokens with the texts `named`, "split": whether special tokens in a text are split, "last": the token
    with the largest id and this id, "moved": [text, id, another id that a file gives it], …}. Raises Refused where the
    light library differs.
    """
    written = tokenizer.backend_tokenizer.to_str()
    light = Tokenizer.from_str(written)
    light.encode_special_tokens = split = bool(tokenizer.split_special_tokens)
    tokens = {name: str(text) for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
    vocabulary = tokenizer.get_vocab()
    special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    for text in (*TEXTS, *special, *(f"a {token} b" for token in special), *(f"a{token}b" for token in special)):
        for added in (False, True):
            ids = light.encode(text, add_special_tokens=added).ids
            if tokenizer(text, add_special_tokens=added)["input_ids"] != ids:
                raise Refused(f"the tokenizers package makes other ids of {text!r} than transformers; update both")
    return {
        "tokenizer": written,
        "tokens": tokens,
        "ids": {name: vocabulary.get(text) for name, text in tokens.items()},
        "named": {text: vocabulary.get(text) for text in named},
        "split": split,
        "last": max(vocabulary.items(), key=lambda item: item[1], default=None),
        "moved": [(text, vocabulary.get(text), id) for text, id in declared(folder) if vocabulary.get(text) != id],
    }


def declared(folder: Path) -> Iterator[tuple[str, int]]:
    """The texts and ids of added tokens as the files beside tokenizer.json give them."""
    for number, token in (content(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}).items():
        yield str(token["content"] if isinstance(token, dict) else token), int(number)
    yield from content(folder / "added_tokens.json").items()


def render(tokenizer: Any, tokens: dict[str, str], system: str | None) -> str | None:
    """The chat template, after it rendered two turns as transformers does; None for a tokenizer without one.

    Raises Refused where it leaves a message out or is rendered differently, and whatever a template raises.
    """
    if tokenizer.chat_template is None:
        return None
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        raise Refused(f"no chat template is named default, only {', '.join(tokenizer.chat_template)}; name one so")
    source = str(tokenizer.get_chat_template())
    template = Template(source, tokens)
    first: Messages = [] if system is None else [{"role": "system", "content": system}]
    turns = template.adapted([*first, *TURNS])
    for chat in (turns, turns[: len(first) + 1]):
        text = template.render(chat)  # bounded, and so before that of transformers
        if WORD not in text.casefold():
            raise Refused("the chat template leaves the user's message out; correct it")
        if text != tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True):
            raise Refused("the chat template is rendered differently than by transformers; correct it")
    source.encode("utf-8")  # a bundle's files are UTF-8
    return source


def limit() -> None:
    """End this process where it takes too much time or memory from now on."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    memory, seconds = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY, int(time.process_time()) + 1 + SECONDS
    for kind, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds)):
        resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def answer(request: dict[str, Any], limit: Callable[[], None]) -> dict[str, Any]:
    """What `read` and `render` return for a request, the template as "template"; `limit` is called between them.

    "refused" says why there is no tokenizer, "unrendered" why there is no template.
    """
    folder, found = Path(request["folder"]), {}
    try:
        tokenizer = load(folder, request["stand_in"])
        found = read(tokenizer, folder, request["named"])
    except Refused as error:
        return {"refused": str(error)}
    except Exception as error:  # transformers and tokenizers raise any type
        return {"refused": f"transformers cannot read it ({first_line(error)})"}
    limit()
    try:
        return found | {"template": render(tokenizer, found["tokens"], request["system"])}
    except Refused as error:
        return found | {"unrendered": str(error)}
    except Exception as error:  # untrusted code can raise any type
        return found | {"unrendered": f"the chat template fails ({first_line(error)})"}


def main() -> None:
    sys.modules["torch"] = None  # type: ignore[assignment]  # not needed, and slow to import
    from transformers.utils import chat_template_utils

    vars(chat_template_utils)["datetime"] = vars(templates)["datetime"] = Clock
    request = json.loads(sys.argv[1])
    Path(request["result"]).write_text(json.dumps(answer(request, limit)), encoding="utf-8")


if __name__ == "__main__":
    main()
