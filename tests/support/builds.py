"""Builds of bundles in tests: their content, builds in processes of their own, and a disk that is full."""

import builtins
import errno
import io
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import export
import export.checkpoint
import runtime
from engines.errors import BundleError
from engines.locks import LOCK
from engines.record import NEXT
from tests.support.cases import sentence

IDS = np.random.default_rng(0).integers(0, 60, (2, 40))


def logits(bundle: Path) -> np.ndarray:
    with runtime.load(bundle, "onnxruntime") as model:
        return model.logits(IDS)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def published(folder: Path) -> dict[str, bytes]:
    """The content of a bundle without what an unfinished build has left in it."""
    return {name: text for name, text in content(folder).items() if not name.startswith(f"{NEXT}/")}


def forked(checkpoint: Path, out: Path, **options: Any) -> Any:
    """A process that builds: a copy of this one, so that it begins to write at once."""

    def work() -> None:
        try:
            export.build(checkpoint, out, **options)
        except BundleError as error:
            sentence(str(error), "another build", "wait")
            os._exit(7)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=work)  # type: ignore[attr-defined, unused-ignore]
    process.start()
    return process


class FullDisk:
    """Lets `left` files be written; the next one is cut in the middle, and so is every later one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
        self.left, self.real = left, io.open
        for module in (builtins, io):
            monkeypatch.setattr(module, "open", self.open)

    def open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        opened = self.real(file, mode, *args, **kwargs)
        if not set(mode) & set("wax+") or Path(str(file)).name == LOCK:
            return opened
        self.left -= 1
        return opened if self.left >= 0 else Full(opened)


class Full:
    """A file whose first write is cut, as a full disk cuts it."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: Any) -> int:
        self.file.write(bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        if name == "fileno":  # so that a copy goes through `write`
            raise AttributeError(name)
        return getattr(self.file, name)


@contextmanager
def full_after(left: int) -> Iterator[FullDisk]:
    with pytest.MonkeyPatch.context() as patch:
        yield FullDisk(patch, left)
