"""Writing files: atomically, with hashes, and with one translation of errors."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from engines.errors import BundleError, OptionError
from engines.files import check_access, describe, link, sha256, signed, write_atomically, writing
from tests.support.cases import refused


def test_a_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["file"]

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"newer")
    assert path.read_bytes() == b"new"


def test_size_and_hash(tmp_path: Path) -> None:
    content = bytes(range(256)) * 8192  # more than one chunk
    (tmp_path / "file").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    assert sha256(tmp_path / "file") == digest
    assert describe(tmp_path / "file") == {"size": len(content), "sha256": digest}


def test_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, path = tmp_path / "source", tmp_path / "deep" / "path"
    source.write_bytes(b"new")
    for _ in range(2):
        link(source, path)
        assert path.samefile(source) and [p.name for p in path.parent.iterdir()] == ["path"]
    (tmp_path / "symlink").symlink_to("source")
    link(tmp_path / "symlink", tmp_path / "deep" / "second")
    assert (tmp_path / "deep" / "second").samefile(source) and not (tmp_path / "deep" / "second").is_symlink()
    path.unlink()
    path.write_bytes(b"old")

    def none(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", none)
    number = 28
    with pytest.raises(OSError, match="No space"):
        link(source, path)
    assert path.read_bytes() == b"old"
    number = 1
    link(source, path)
    assert path.read_bytes() == b"new" and not path.samefile(source), "a copy where there are no links"


def test_a_signed_file() -> None:
    raw = signed({"b": 1, "a": [2]})
    content = json.loads(raw)
    digest = content.pop("sha256")
    assert content == {"b": 1, "a": [2]} and digest == hashlib.sha256(b'{"a":[2],"b":1}').hexdigest()


def test_errors_are_translated(tmp_path: Path) -> None:
    missing = tmp_path / "nothing" / "file"
    wanted = f"cannot write {missing} (No such file or directory); choose another"
    with refused(OptionError, wanted), writing(missing, "choose another"):
        missing.write_bytes(b"")
    with refused(BundleError, "cannot write here (odd); retry"), writing(Path("here"), "retry", BundleError):
        raise OSError("odd")
    with pytest.raises(ValueError, match="another kind"), writing(missing, ""):
        raise ValueError("another kind")


def test_what_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not said to be missing; what is missing passes."""
    for path in (tmp_path, tmp_path / "missing", tmp_path / "a\0"):
        check_access(path, BundleError)

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for name, replacement in (("access", lambda *_, **__: False), ("stat", forbidden)):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, replacement)
            with refused(BundleError, f"{tmp_path} may not be read", "Permission denied", "change its permissions"):
                check_access(tmp_path, BundleError)
