"""What several test files share: bundles built once a run, and the shape of a good error.

The bundles are read only: a test that damages or rebuilds one asks for a copy.
Everything runs on one thread; ONNX Runtime sizes its pool once in a process, so
it is sized here.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import export
import runtime
from engines.bundle import MANIFEST, signed
from engines.errors import ElasticError
from engines.onnxruntime import share_threads
from engines.spec import DRIFTS
from scripts.make_random_checkpoint import SHAPES, make_checkpoint

DRIFT_PARTS = tuple(f"drift_{kind}" for kind in DRIFTS)
GOLDEN = Path(__file__).parent / "data" / "llada-tiny-a"
SPECIAL = ("<|mdm_mask|>", "<|endoftext|>", "<|startoftext|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEXT_SHAPE = SHAPES["tiny"] | {
    "vocab_size": 256 + len(SPECIAL), "embedding_size": 264, "mask_token_id": 256, "eos_token_id": 257,
    "pad_token_id": 257,
}  # fmt: skip

share_threads(1)
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_configure() -> None:
    """In the background of a shell Ctrl-C is ignored, and children inherit that; tests of Ctrl-C need it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_core() -> Iterator[None]:
    """Models that are loaded without a number of threads take one too: spinning threads make a busy machine crawl."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda pid: {0})
        yield


@pytest.fixture(scope="session")
def golden_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint in fp32: window 32, track_num 4; mask id 255, EOS 250, no tokenizer. Read only."""
    out = tmp_path_factory.mktemp("golden") / "bundle"
    return export.build(GOLDEN, out, precision="fp32", window=32, track_num=4)


@pytest.fixture(scope="session")
def golden(golden_bundle: Path) -> Iterator[runtime.Runtime]:
    """The golden bundle on ONNX Runtime, one thread."""
    with runtime.load(golden_bundle, "onnxruntime", threads=1) as model:
        yield model


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: 2 layers of width 32, vocabulary 64, mask 63, EOS 62, no tokenizer. Read only."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny", SHAPES["tiny"])


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with a byte-level tokenizer and a chat template. Read only."""
    folder = make_checkpoint(tmp_path_factory.mktemp("text") / "text", TEXT_SHAPE)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def text_bundle(text_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `text_checkpoint`, window 16 and track_num 1. Read only."""
    return export.build(text_checkpoint, tmp_path_factory.mktemp("text") / "bundle")


@pytest.fixture
def bundle_copy(text_bundle: Path, tmp_path: Path) -> Path:
    """A copy of `text_bundle` to damage."""
    return Path(shutil.copytree(text_bundle, tmp_path / "copy"))


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
