"""The tokenizer and the chat template of a checkpoint, as transformers reads them, for a bundle.

Checkpoints keep them in many files. transformers reads these at build time, in a process of its own
(`export.checkpoint.canonical`), and a bundle gets the same in three: tokenizer.json, chat_template.jinja, and
tokenizer_config.json with the texts of the special tokens, {"special_tokens": {name: text}, "split_special_tokens"}.
"""

import codecs
import hashlib
import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from engines.config import ModelConfig
from engines.errors import INSTALL, BackendError, CheckpointError
from export.checkpoint import Family
from export.checkpoint.files import AGAIN, json_object, read_bytes

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
PAIR = ("vocab.json", "merges.txt")
VOCABULARIES = (TOKENIZER, *PAIR, "tokenizer.model")  # a tokenizer needs some of them
BESIDE = (SETTINGS, "special_tokens_map.json", "added_tokens.json", TEMPLATE, "chat_template.json")
GENERATION = "generation_config.json"
FILES = (*VOCABULARIES, *BESIDE, GENERATION)
ROOT = Path(__file__).resolve().parents[2]  # of the packages
SECONDS = 300  # that transformers may take, also on a busy machine
logger = logging.getLogger(__name__)


def sources(directory: Path) -> list[Path]:
    """The files of the tokenizer, its templates and the generation defaults that a checkpoint has."""
    named = [path for name in FILES if (path := directory / name).is_file()]
    return [*named, *sorted((directory / "additional_chat_templates").glob("*.jinja"))]


def digest(directory: Path) -> str:
    """SHA-256 (hex) over the names and content of `sources`."""
    lines = (f"{path.name} {hashlib.sha256(content(path)).hexdigest()}" for path in sources(directory))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def content(path: Path) -> bytes:
    """The bytes of a file without a byte order mark; raises CheckpointError."""
    return read_bytes(path).removeprefix(codecs.BOM_UTF8)


def optional_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty without the file; raises CheckpointError for anything else in it."""
    return json_object(path) if path.is_file() else {}


def token_ids(directory: Path) -> dict[str, int]:
    """The ids of all tokens by text, from the files of a checkpoint; a vocabulary goes before files beside it.

    Raises CheckpointError for a file that is damaged.
    """
    found: dict[str, int] = {}
    try:
        for number, token in (optional_object(directory / SETTINGS).get("added_tokens_decoder") or {}).items():
            found[token["content"]] = int(number)
        found = optional_object(directory / "added_tokens.json") | found | optional_object(directory / "vocab.json")
        whole = optional_object(directory / TOKENIZER)
        vocabulary = (whole.get("model") or {}).get("vocab") or {}
        found |= vocabulary if isinstance(vocabulary, dict) else {}
        return found | {token["content"]: int(token["id"]) for token in whole.get("added_tokens") or ()}
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{directory}: its tokens have no ids ({error!r}); {AGAIN}") from error


def special_id(directory: Path, text: str | None) -> int | None:
    """The id of the special token with the text `text`; None where the checkpoint lacks it or has no tokenizer.

    Raises CheckpointError for a file that is damaged.
    """
    return None if text is None else token_ids(directory).get(text)


def canonical(directory: Path, family: Family, config: ModelConfig) -> dict[str, bytes]:
    """The files of a bundle's tokenizer and template, by name; none for a checkpoint without a tokenizer.

    Raises CheckpointError for a tokenizer that cannot be read or does not belong to the model, and for a template that
    cannot render a chat, which a base model may have: it is left out, with a warning. Raises BackendError where
    transformers is not installed.
    """
    if not any((directory / name).is_file() for name in VOCABULARIES):
        return {}
    pair = {name: (directory / name).is_file() for name in PAIR}
    if not (directory / TOKENIZER).is_file() and sum(pair.values()) == 1:
        has, lacks = sorted(pair, key=pair.__getitem__, reverse=True)
        raise CheckpointError(f"{directory} has {has} and no {lacks}, expected both or {TOKENIZER}; {AGAIN}")
    if importlib.util.find_spec("transformers") is None:
        raise BackendError(
            f"a build with a tokenizer needs transformers, which is not installed; {INSTALL.format(extra='export')}"
        )
    found = read(directory, family, config)
    if "refused" in found:
        raise CheckpointError(f"{directory}: the tokenizer cannot be used: {found['refused']}")
    check(directory, family, config, found)
    if "unrendered" in found:
        if not is_base(directory):
            raise CheckpointError(f"{directory}: {found['unrendered']}")
        logger.warning("%s: the bundle has no chat template, as for a base model: %s", directory, found["unrendered"])
    settings = {"special_tokens": found["tokens"], "split_special_tokens": found["split"]}
    files = {TOKENIZER: found["tokenizer"], SETTINGS: json.dumps(settings, indent=1, ensure_ascii=False) + "\n"}
    if found.get("template") is not None:
        files[TEMPLATE] = found["template"]
    return {name: text.encode("utf-8") for name, text in files.items()}


def read(directory: Path, family: Family, config: ModelConfig) -> dict[str, Any]:
    """What `export.checkpoint.canonical` answers about a copy of the tokenizer's files.

    The copy has no other file; JSON objects are checked, and byte order marks are left out. Raises CheckpointError.
    """
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "checkpoint"
        for path in (directory / "config.json", *sources(directory)):
            if path.suffix == ".json":
                optional_object(path)
            copy = folder / path.relative_to(directory)
            copy.parent.mkdir(exist_ok=True, parents=True)
            copy.write_bytes(content(path))
        request = {
            "folder": str(folder), "result": str(Path(work) / "result.json"), "stand_in": family.tokenizer,
            "system": config.system, "named": [text for text in (family.mask, family.end_of_turn) if text],
        }  # fmt: skip
        try:
            found = ask(request)
        except CheckpointError as error:
            raise CheckpointError(f"{directory}: {error}") from error
        for key in {"refused", "unrendered"} & found.keys():
            found[key] = found[key].replace(str(folder), str(directory))
        return found


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """The answer of `export.checkpoint.canonical` in a process of its own; raises CheckpointError if there is none."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HOME": str(Path(request["result"]).parent)}
    command = [sys.executable, "-m", "export.checkpoint.canonical", json.dumps(request)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | quiet | offline, capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"reading the tokenizer took more than {SECONDS} s; {AGAIN}") from error
    if done.returncode == -signal.SIGXCPU:
        raise CheckpointError("the chat template does not come to an end; correct it")
    if done.returncode:
        last = (done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise CheckpointError(f"the tokenizer cannot be read ({last}); {AGAIN}")
    return dict(json.loads(Path(request["result"]).read_text(encoding="utf-8")))


def check(directory: Path, family: Family, config: ModelConfig, found: dict[str, Any]) -> None:
    """Raise CheckpointError for tokens that do not belong to the model; note what differs and does no harm."""
    ids, (text, last) = found["ids"], found["last"] or ("", -1)
    if last >= config.vocab:
        raise CheckpointError(
            f"{directory}: the token {text!r} has id {last}, and the embedding has {config.vocab} rows; use the "
            "tokenizer that belongs to these weights"
        )
    generation = optional_object(directory / GENERATION)
    masks = {"the tokenizer": ids.get("mask_token"), GENERATION: generation.get("mask_token_id")}
    masks[f"the token {family.mask}"] = found["named"].get(family.mask)
    for place, mask in masks.items():
        if mask not in (None, config.mask_id):
            raise CheckpointError(
                f"{directory}: the mask's id is {mask} by {place} and {config.mask_id} by config.json; correct the one "
                "that is wrong"
            )
    if config.mask_id in (config.eos_id, *config.more_ends, config.eot_id, ids.get("eos_token")):
        raise CheckpointError(f"{directory}: the mask's id {config.mask_id} is also that of an end; correct it")
    files = (generation, optional_object(directory / "config.json"))
    padding = {ids.get("pad_token"), *(file.get("pad_token_id") for file in files)} - {None}
    if len(padding) > 1:
        listed = ", ".join(map(str, sorted(padding, key=str)))
        logger.warning("%s: its files give the padding different ids (%s); decoding pads nothing", directory, listed)
    for text, number, elsewhere in found["moved"]:
        logger.warning("%s: %r has id %s as transformers reads it, not %s", directory, text, number, elsewhere)


def is_base(directory: Path) -> bool:
    """Whether a checkpoint is called a base model, by its folder, a hub's cache, or its config.json."""
    path = directory.resolve()
    names = [path.name, str(optional_object(directory / "config.json").get("_name_or_path"))]
    names += [part for part in path.parts if part.startswith("models--")]
    return any(re.search(r"(^|[-_])base($|[-_])", name, re.IGNORECASE) for name in names)
