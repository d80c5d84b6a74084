"""The tokenizer files of a checkpoint, and a tokenizer.json written from two of them."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import export
import runtime
from engines.errors import CheckpointError
from export.checkpoint.families.dream import FAMILY as DREAM
from export.checkpoint.reader import open_checkpoint
from tests.support.cases import refused
from tests.support.goldens import DATA

GOLDEN = DATA / "dream-tiny"


SAYINGS = ["It's 2026, isn't it?", "naïve  café\n\n  12345 don't", "  <|im_end|>x<|endoftext|>", "日本語\r\n \t"]


def test_tokenizer_files(sharded: Path) -> None:
    assert open_checkpoint(sharded).tokenizer_files() == []
    for name in ("generation_config.json", "tokenizer.json", "README.md", "merges.txt"):
        (sharded / name).write_text("{}")
    found = open_checkpoint(sharded).tokenizer_files()
    assert found == [sharded / "tokenizer.json", sharded / "generation_config.json"], "the pair is for want of it"


def test_a_tokenizer_of_two_files(tmp_path: Path) -> None:
    """Written as tokenizer.json, it says what a tokenizer made the long way says."""
    plain = Tokenizer(models.BPE())
    plain.normalizer = normalizers.NFC()
    assert DREAM.split is not None
    from tokenizers import Regex

    plain.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(DREAM.split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    plain.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain.train_from_iterator(SAYINGS * 3, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    folder = tmp_path / "dream"
    folder.mkdir()
    for path in GOLDEN.iterdir():
        (folder / path.name).symlink_to(path)
    plain.model.save(str(folder))
    special = ["<|endoftext|>", "<|im_end|>"]
    added = {plain.get_vocab_size() + i: {"content": text, "special": True} for i, text in enumerate(special)}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    plain.add_special_tokens(special)
    bundle = export.build(folder, tmp_path / "bundle", backends=[])
    with runtime.load(bundle, "eager", threads=1) as loaded:
        assert loaded.bundle.config.eot_id == plain.token_to_id("<|im_end|>")
        for text in SAYINGS:
            assert loaded.text.encode(text).tolist() == plain.encode(text, add_special_tokens=False).ids, text
        assert loaded.text.decode(loaded.text.encode(SAYINGS[1])) == SAYINGS[1]
    assert export.build(folder, tmp_path / "bundle", backends=[]) == bundle, "again, and nothing to do"
    (folder / "merges.txt").write_text("nonsense that is no pair\n")
    with refused(CheckpointError, "merges.txt", "make no tokenizer", "again"):
        export.build(folder, tmp_path / "other", backends=[])
    assert not (tmp_path / "other" / "onnx").exists(), "before any part is made"
    (folder / "merges.txt").unlink()
    with refused(CheckpointError, "vocab.json", "no merges.txt"):
        export.build(folder, tmp_path / "third", backends=[])
