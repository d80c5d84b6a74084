"""Stamps: files are reused if key and content are unchanged, and made again otherwise."""

from pathlib import Path

import pytest

import export
import export.checkpoint
from engines.bundle import MANIFEST, STAMPS
from engines.files import describe
from export import stamps
from export.stamps import Files
from tests.support.builds import content


@pytest.mark.slow
def test_a_damaged_stamp_is_not_believed(text_checkpoint: Path, text_bundle: Path, bundle_copy: Path) -> None:
    """Many a byte of a stamp changed, in an unfinished build: the next one gives what an undisturbed one gives."""
    stamp = bundle_copy / STAMPS / "onnx-layer_01.onnx.json"
    raw = stamp.read_bytes()
    for at in range(0, len(raw), 17):
        (bundle_copy / MANIFEST).unlink()
        stamp.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        export.build(text_checkpoint, bundle_copy)
        assert content(bundle_copy) == content(text_bundle), at
    for other in (b"", b"[]", b"1", b'{"key": 1}'):
        (bundle_copy / MANIFEST).unlink()
        stamp.write_bytes(other)
        export.build(text_checkpoint, bundle_copy)
        assert content(bundle_copy) == content(text_bundle), other


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / STAMPS).mkdir()
    return tmp_path


def made(root: Path, key: str, text: bytes = b"x", names: tuple[str, ...] = ("a", "b")) -> tuple[Files, int]:
    """The files kept for `key`, and how many were written for it."""
    calls = 0

    def make() -> Files:
        nonlocal calls
        calls += 1
        return {name: stamps.write(root / name, text) for name in names}

    return stamps.kept(root, list(names), key, make), calls


def test_files_are_made_once(root: Path) -> None:
    files, calls = made(root, "key")
    assert calls == 1 and files == {name: describe(root / name) for name in ("a", "b", f"{STAMPS}/a.json")}
    assert made(root, "key") == (files, 0)
    assert stamps.reusable(root, ["a", "b"], "key") == files


@pytest.mark.parametrize("change", ["key", "content", "size", "missing", "names", "no stamp"])
def test_files_are_made_again(root: Path, change: str) -> None:
    made(root, "key")
    if change == "missing":
        (root / "b").unlink()
    elif change == "no stamp":
        (root / STAMPS / "a.json").unlink()
    elif change in ("content", "size"):
        (root / "b").write_bytes(b"y" if change == "content" else b"xx")
    key, names = "other" if change == "key" else "key", ("a", "c") if change == "names" else ("a", "b")
    assert stamps.reusable(root, list(names), key) is None
    files, calls = made(root, key, names=names)
    assert calls == 1 and made(root, key, names=names) == (files, 0)


def test_what_looks_does_not_write(root: Path) -> None:
    made(root, "key")
    before = content(root)
    stamps.reusable(root, ["a", "b"], "other")
    stamps.reusable(root, ["a", "c"], "key")
    assert content(root) == before


def test_a_file_that_cannot_be_made_leaves_no_stamp(root: Path) -> None:
    def fail() -> Files:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        stamps.kept(root, ["a"], "key", fail)
    assert not list(root.glob(f"{STAMPS}/*")) and stamps.reusable(root, ["a"], "key") is None
