"""Checkpoints and bundles that several tests share, and the shape of a good error."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engines.bundle import MANIFEST
from engines.errors import ElasticError
from engines.files import signed
from engines.signatures.gpu import DRIFTS
from scripts.experiments.make_random_checkpoint import SHAPES

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
GOLDEN = DATA / "llada-tiny-a"
DRIFT_PARTS = tuple(f"drift_{kind}" for kind in DRIFTS)
SPECIAL = ("<|mdm_mask|>", "<|endoftext|>", "<|startoftext|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEXT_SHAPE = SHAPES["tiny"] | {
    "vocab_size": 256 + len(SPECIAL), "embedding_size": 264, "mask_token_id": 256, "eos_token_id": 257,
    "pad_token_id": 257,
}  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes: each byte is a token, the special ones follow. No merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<|startoftext|>",
        "eos_token": {"__type": "AddedToken", "content": "<|endoftext|>", "special": True},
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@contextmanager
def refused(kind: type[ElasticError], *words: str) -> Iterator[None]:
    """The body raises `kind` with one sentence that holds every word: what is wrong, and the remedy."""
    with pytest.raises(kind) as caught:
        yield
    sentence(str(caught.value), *words)
    assert type(caught.value) is kind


def sentence(text: str, *words: str) -> None:
    """`text` is one line and holds every word."""
    assert "\n" not in text.strip() and "Traceback" not in text, text
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in: {text}"


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest, and sign it as a build with this content would have."""
    content = json.loads((bundle / MANIFEST).read_text())
    content.pop("sha256")
    change(content)
    (bundle / MANIFEST).write_bytes(signed(content))
