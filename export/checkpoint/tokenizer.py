"""The tokenizer files of a checkpoint: ids of special tokens, and tokenizer.json where there is none.

Some checkpoints are published with the vocab.json and merges.txt of a byte-level
BPE and define the rest of the tokenizer in code. A bundle holds data only, so the
same tokenizer is written as tokenizer.json.
"""

import json
from pathlib import Path
from typing import Any

from engines.errors import CheckpointError

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
PAIRS = ("vocab.json", "merges.txt")
FILES = (TOKENIZER, SETTINGS, "special_tokens_map.json", "chat_template.jinja", "generation_config.json", *PAIRS)
AGAIN = "download or save the checkpoint again"


def special_id(directory: Path, text: str | None) -> int | None:
    """The id of the special token with the text `text`; None where the checkpoint lacks it or has no tokenizer.

    Raises CheckpointError for a file that cannot be read.
    """
    for name in (SETTINGS, TOKENIZER):
        for token in added_tokens(directory / name):
            if text is not None and token.get("content") == text:
                return int(token["id"])
    return None


def added_tokens(path: Path) -> list[dict[str, Any]]:
    """The added tokens in a tokenizer's file, {"id", "content", …} each; raises CheckpointError for a damaged file."""
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if path.name == TOKENIZER:
            return list(content.get("added_tokens") or [])
        return [{"id": int(key)} | value for key, value in (content.get("added_tokens_decoder") or {}).items()]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a tokenizer's JSON object ({error}); {AGAIN}") from error


def needs_writing(directory: Path) -> bool:
    """Whether the checkpoint has `PAIRS` and no tokenizer.json; raises CheckpointError for one file of the pair."""
    found = [name for name in PAIRS if (directory / name).is_file()]
    if (directory / TOKENIZER).is_file() or not found:
        return False
    if len(found) < len(PAIRS):
        (missing,) = set(PAIRS) - set(found)
        raise CheckpointError(f"{directory} has {found[0]} and no {missing}, expected both or {TOKENIZER}; {AGAIN}")
    return True


def write_tokenizer(directory: Path, split: str | None, path: Path) -> None:
    """Write the checkpoint's byte-level BPE as the tokenizer.json `path`; `split` is the pattern of its words.

    Raises CheckpointError where the files are no tokenizer, or the family has no pattern.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if split is None:
        raise CheckpointError(
            f"{directory} has no {TOKENIZER}, and its family has no pattern that splits text; {AGAIN}"
        )
    try:
        tokenizer = Tokenizer(models.BPE.from_file(*(str(directory / name) for name in PAIRS)))
    except Exception as error:  # the library raises plain Exception
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{directory}: {' and '.join(PAIRS)} make no tokenizer ({reason}); {AGAIN}") from error
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(split), behavior="isolated")
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pieces])
    tokenizer.decoder = decoders.ByteLevel()
    for token in sorted(added_tokens(directory / SETTINGS), key=lambda token: int(token["id"])):
        made = AddedToken(token["content"], special=bool(token.get("special")), normalized=False)
        (tokenizer.add_special_tokens if made.special else tokenizer.add_tokens)([made])
        if tokenizer.token_to_id(token["content"]) != token["id"]:
            raise CheckpointError(
                f"{directory / SETTINGS}: {token['content']!r} has id {token['id']}, expected "
                f"{tokenizer.token_to_id(token['content'])} as the next of {PAIRS[0]}; {AGAIN}"
            )
    tokenizer.save(str(path))
