"""The bench of batches: ragged sequences, and the tokens that they have alone."""

import json
from pathlib import Path

import pytest

from runtime.cli import main


def test_batches(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same sequences in batches of each size, ragged, and the tokens that they have alone."""
    arguments = ["--backends", "onnxruntime", "--policies", "elastic", "--limit", "1", "--prompt-length", "200"]
    rest = ["--gen-length", "32", "--threads", "1", "--json", "--batches", "1,3"]
    assert main(["bench", str(bundle), *arguments, *rest]) == 0
    rows = json.loads(capsys.readouterr().out)["batches"]
    assert [(row["batch"], row["sequences"], row["equal_to_alone"]) for row in rows] == [(1, 3, 3), (3, 3, 3)]
    assert rows[0]["times_faster"] == 1.0 and rows[1]["tokens_per_second"] > 0
    for wrong, words in (("1,x", ("whole numbers", "1,x")), ("99", ("1 … 16", "not 99", "--max-batch 99"))):
        assert main(["bench", str(bundle), *arguments, *rest[:-1], wrong]) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
