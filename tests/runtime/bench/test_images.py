"""The bench of answers about images."""

import json
from pathlib import Path

import pytest

import export
from runtime.cli import main
from tests.support.vision import CHECKPOINT, FILES


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.build(CHECKPOINT, tmp_path_factory.mktemp("images") / "bundle", max_length=512, window=16)


@pytest.mark.slow
def test_the_bench(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The image comes first, then the first commit, then the answer."""
    argv = ["bench", str(bundle), "--image", str(FILES["waves"]), "--gen-length", "32", "--threads", "1", "--limit"]
    chosen = [
        "--policies",
        "full,elastic",
        "--backends",
        "onnxruntime,eager",
        "--json",
        "--out",
        str(tmp_path / "b.json"),
    ]
    assert main([*argv, "2", *chosen]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line == json.loads((tmp_path / "b.json").read_text()) and "command" in line and len(line["devices"]) == 2
    assert [row["case"] for row in line["images"]][:2] == ["onnxruntime full", "eager full"]
    for row in line["images"]:
        assert 0 < row["image_seconds"] < row["first_commit_seconds"] <= row["answer_seconds"]
        assert row["image_tokens"] == 81 and row["rounds"] == 2 and 0 < row["image_fraction"] < 1
    assert main([*argv, "0"]) != 0 and "limit must lie in 1 …" in capsys.readouterr().err
