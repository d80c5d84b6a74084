"""Files that a command writes: what is refused before the work, and that nothing else is written over."""

import os
from pathlib import Path

import pytest

from engines.errors import OptionError
from runtime.outputs import ANY, FIGURES, PLOTS, TRACE, check_distinct, check_output
from tests.support.cases import refused


@pytest.mark.parametrize("begin", [TRACE, FIGURES, *PLOTS.values()])
def test_only_its_own_kind_is_written_over(tmp_path: Path, begin: str) -> None:
    file = tmp_path / "file"
    for content in (b"", begin.encode("latin-1") + b" and more"):
        file.write_bytes(content)
        check_output(file, begin, "choose another")
    for content in (b"# mine", begin.encode("latin-1")[:-1]):
        file.write_bytes(content)
        with refused(OptionError, str(file), "something else", "choose another"):
            check_output(file, begin, "choose another")
        assert file.read_bytes() == content
        check_output(file, ANY, "choose another")


def test_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    for file in (None, tmp_path / "new", tmp_path / "a" / "b" / "new", Path("/dev/null"), Path("/dev/full")):
        check_output(file, TRACE, "choose another")
    assert os.listdir(tmp_path) == ["file"], "nothing was made"
    for file, reason in ((tmp_path, "Is a directory"), (tmp_path / "file" / "new", "file is not a directory")):
        with refused(OptionError, f"cannot write {file}", reason, "choose another"):
            check_output(file, ANY, "choose another")
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    for file in (tmp_path / "file", tmp_path / "new"):
        with refused(OptionError, f"cannot write {file}", "Permission denied", "choose another"):
            check_output(file, ANY, "choose another")


def test_two_outputs_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_distinct(None, Path("a"), Path("b"), None)
    with refused(OptionError, "a is to hold two outputs", "a file of its own"):
        check_distinct(Path("a"), tmp_path / "a")
