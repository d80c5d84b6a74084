"""What several test files share: bundles built once a run, and the shape of a good error.

The bundles are read only: a test that damages or rebuilds one asks for a copy.
Everything runs on one thread; ONNX Runtime sizes its pool once in a process, so
it is sized here.
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
from hypothesis import settings

import export
import runtime
from engines.ort.sessions import share_threads
from scripts.experiments.make_random_checkpoint import SHAPES, make_checkpoint
from tests.support.cases import GOLDEN, TEXT_SHAPE, write_tokenizer
from tests.support.commands import Call, Result

share_threads(1)
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_configure() -> None:
    """In the background of a shell Ctrl-C is ignored, and children inherit that; tests of Ctrl-C need it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


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


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command line in this process: exit code, standard output and error."""

    def run(main: Callable[[list[str]], int], *argv: object) -> Result:
        capsys.readouterr()
        try:
            code: Any = main([str(arg) for arg in argv])
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return run
