"""The model on the CPU: which graphs it has."""

from pathlib import Path

import pytest

import export
import runtime
from engines.bundle import Bundle

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def test_large_models_have_no_second_copy_of_their_weights(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with runtime.load(export.build(tiny_checkpoint, tmp_path / "few"), "onnxruntime", threads=1) as model:
        expected = model.generate([5, 6, 7], gen_length=24, gamma=0.99)
        assert model.model.runs["reuse"]
    monkeypatch.setattr("export.compilers.onnxruntime.FEW_BYTES", 0)
    bundle = export.build(tiny_checkpoint, tmp_path / "many")
    assert "reuse" not in Bundle.open(bundle).manifest.engines["onnxruntime"]["parts"]
    with runtime.load(bundle, "onnxruntime", threads=1) as model:
        out = model.generate([5, 6, 7], gen_length=24, gamma=0.99)
        assert out.sequence == expected.sequence and not model.model.runs["reuse"]
