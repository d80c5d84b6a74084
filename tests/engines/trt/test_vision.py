"""The vision parts on TensorRT: on the fake GPU, and a real build."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import export
from engines import registry as backends
from engines.bundle import Bundle
from engines.vision import open_vision
from export.verify import verify
from tests.support.fake_gpu import fake_gpu
from tests.support.vision import CASES, CHECKPOINT, GOLDEN, close


@pytest.mark.slow
def test_on_the_fake_gpu(tmp_path: Path) -> None:
    """Bindings, memory and groups of tiles; the numbers are ONNX Runtime's. It has not run on a GPU."""
    stored = load_file(GOLDEN / "vision.safetensors")
    with fake_gpu():
        built = Bundle.open(export.build(CHECKPOINT, tmp_path / "b", backends=["tensorrt"], max_length=64, window=8))
        model = backends.load(built, "tensorrt")
        runner = open_vision(model)
        for case in CASES:
            close(case, runner.project(stored[f"{case}.pixel_values"]), stored[f"{case}.projected"], 1e-4)
        assert np.array_equal(runner.newline, stored["gradient.image_tokens"][-1])
        held = len(model.cuda.owned)  # type: ignore[attr-defined]
        runner.close()
        assert len(model.cuda.owned) < held  # type: ignore[attr-defined]
        runner.close()
        assert model.runs["tower"] and model.seconds["projector"] > 0
        model.close()
        assert {"tower", "projector"} <= {row.part for row in verify(built, "tensorrt", 5e-4)}


@pytest.mark.slow
def test_it_builds_for_tensorrt(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx, which builds without a GPU, is not installed")
    built = export.build(
        CHECKPOINT, tmp_path / "rtx", precision="fp16", backends=["tensorrt"], max_length=256, window=8,
        flavour="tensorrt_rtx", capabilities=["8.9"],
    )  # fmt: skip
    entry = Bundle.open(built).engines("tensorrt")
    for part in ("tower", "projector"):
        assert entry["profiles"][part] == [{"N": [1, 7, 37]}]
        assert len(set(entry["parts"][part]["plans"].values())) == 1, "one plan, whatever the length"
    assert entry["parts"]["tower"]["layers"]["ATTENTION_INPUT"] == 2, "one for each layer, and whole"
    assert Bundle.open(built).file(entry["parts"]["tower"]["weights"]).name == "tower.safetensors"
