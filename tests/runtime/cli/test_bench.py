"""The command `bench`: its JSON line, its files, and what it refuses before it runs."""

import json
from pathlib import Path

import pytest

import export
from runtime.cli import main

PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.build("demo", tmp_path_factory.mktemp("demo") / "bundle", max_length=640)


def test_the_command(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib; scripts/setup.sh installs it")
    arguments = ["--backends", "onnxruntime", "--policies", "elastic,dual", "--limit", "1", "--prompt-length", "150"]
    files = ["--json", "--out", str(tmp_path / "b.json"), "--plot", str(tmp_path / "p" / "b.png")]
    assert main(["bench", str(bundle), *arguments, "--gen-length", "32", "--threads", "1", *files]) == 0
    shown = capsys.readouterr()
    line = json.loads(shown.out)
    assert "bench: 1 of 1" in shown.err
    assert line == json.loads((tmp_path / "b.json").read_text())
    assert [row["case"] for row in line["cases"]] == ["onnxruntime elastic", "onnxruntime dual"]
    assert line["baseline"] == "onnxruntime elastic" and line["command"].startswith("python -m runtime")
    assert (tmp_path / "p" / "b.png").read_bytes().startswith(PNG)


def test_what_is_refused_before_anything_runs(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong options, and a file that is not the bench's to write over."""
    monkeypatch.setattr("runtime.cli.bench.bench", lambda *_: pytest.fail("it ran"))
    text = tmp_path / "notes.md"
    text.write_text("# mine")
    for more, words in (
        (["--out", str(text)], ("notes.md", "something else", "another --out")),
        (["--plot", str(text)], ("notes.md", "ending in .png")), (["--policies", "fast"], ("'fast'", "choose from")),
        (["--out", str(text / "b.json")], ("notes.md is not a directory",)), (["--limit", "0"], ("limit", "1 …")),
        (["--out", "b.png", "--plot", "b.png"], ("b.png is to hold two outputs",)),
        (["--gen-length", "640"], ("gen_length", "1 … 639")),
        (["--gen-length", "32", "--prompt-length", "999999999"], ("prompt_length", "1 … 608")),
        (["--plot", "x.foo"], ("x.foo", ".png")), (["--baseline", "foo"], ("'foo'", "choose from", "elastic")),
        (["--batches", "a"], ("whole numbers", "'a'")),
        (["--image", "x.png", "--batches", "1"], ("--image", "leave --batches")),
    ):  # fmt: skip
        assert main(["bench", str(bundle), "--backends", "onnxruntime", "--threads", "1", *more]) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
    assert text.read_text() == "# mine"
