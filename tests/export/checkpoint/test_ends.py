"""The ids that end an answer: from config.json, generation_config.json and the end of a turn, all of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from engines.errors import CheckpointError
from export.checkpoint.reader import open_checkpoint
from tests.support.cases import refused
from tests.support.checkpoints import edit

TURN = {"added_tokens_decoder": {"9": {"content": "<|eot_id|>", "special": True}}}


def write(folder: Path, name: str, content: Any, bom: bytes = b"") -> None:
    (folder / name).write_bytes(bom + json.dumps(content).encode())


@pytest.mark.parametrize(
    ("config", "generation", "eos", "ends"),
    [(62, None, (62,), (62, 9)), ([62], None, (62,), (62, 9)), ([62, 7], None, (62, 7), (62, 7, 9)),
     (62, 7, (62, 7), (62, 7, 9)), (62, [7, 62, 8], (62, 7, 8), (62, 7, 8, 9)),
     ([5, 6], [6, 7], (5, 6, 7), (5, 6, 7, 9)), (None, 7, (7,), (7, 9)),
     (None, [7, 8], (7, 8), (7, 8, 9)), (62, [62, 9], (62,), (62, 9)),
     (9, None, (9,), (9,)), ([62, 62], [], (62,), (62, 9))],
)  # fmt: skip
def test_all_that_are_declared_are_united(
    sharded: Path, config: Any, generation: Any, eos: tuple[int, ...], ends: tuple[int, ...]
) -> None:
    edit(sharded / "config.json", lambda raw: raw.update(eos_token_id=config))
    if generation is not None:
        write(sharded, "generation_config.json", {"eos_token_id": generation}, bom=b"\xef\xbb\xbf")
    write(sharded, "tokenizer_config.json", TURN)
    found = open_checkpoint(sharded).config
    assert (found.eos_ids, found.end_ids, found.eot_id) == (eos, ends, 9)
    assert type(found).from_json(json.loads(json.dumps(found.to_json())), "there") == found


@pytest.mark.parametrize("value", [64, -1, [62, 64], "62", [62, None], 62.0, {"a": 1}, True, 63, [63]])
def test_ends_that_are_none(sharded: Path, value: Any) -> None:
    """An id outside the vocabulary of 64, one that is no id, and the mask's, 63; in either file."""
    write(sharded, "generation_config.json", {"eos_token_id": value})
    with refused(CheckpointError, "generation_config.json", "eos_token_id", json.dumps(value), "correct it"):
        open_checkpoint(sharded)
    (sharded / "generation_config.json").unlink()
    edit(sharded / "config.json", lambda raw: raw.update(eos_token_id=value))
    with refused(CheckpointError, "config.json", "eos_token_id"):
        open_checkpoint(sharded)


def test_a_turn_that_the_mask_ends(sharded: Path) -> None:
    write(sharded, "tokenizer_config.json", {"added_tokens_decoder": {"63": {"content": "<|eot_id|>"}}})
    with refused(CheckpointError, "<|eot_id|>", "63", "mask"):
        open_checkpoint(sharded)


def test_without_any_end(sharded: Path) -> None:
    edit(sharded / "config.json", lambda raw: raw.update(eos_token_id=None))
    with refused(CheckpointError, "eos_token_id missing or null"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(("pad", "wanted"), [(5, 5), (None, None), (-1, None), (64, None)])
def test_the_padding(sharded: Path, pad: Any, wanted: int | None) -> None:
    edit(sharded / "config.json", lambda raw: raw.update(pad_token_id=pad))
    assert open_checkpoint(sharded).config.pad_id == wanted


def test_byte_order_marks(sharded: Path) -> None:
    config = sharded / "config.json"
    plain = open_checkpoint(sharded).config
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert open_checkpoint(sharded).config == plain
