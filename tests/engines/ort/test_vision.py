"""The vision parts as sessions: opened with the first image, counted with the model's own parts."""

from pathlib import Path
from typing import cast

import numpy as np
import pytest

import export
import runtime
from engines.ort.model import OnnxRuntimeModel
from engines.ort.vision import OnnxRuntimeVision
from engines.vision import open_vision
from tests.support.cases import DATA


@pytest.mark.slow
def test_runs_are_counted_with_the_models_own(tmp_path: Path) -> None:
    built = export.build(DATA / "llada-v" / "llada-v-tiny", tmp_path / "bundle", max_length=64, window=8)
    with runtime.load(built, "onnxruntime", threads=1) as loaded:
        model = cast(OnnxRuntimeModel, loaded.model)
        assert not model.runs["tower"] and "tower" not in model.sessions
        vision = open_vision(model)
        assert isinstance(vision, OnnxRuntimeVision) and vision.sessions.threads == model.sessions.threads
        tiles = vision.group + 1
        rows = vision.project(np.zeros((tiles, 3, 56, 56), np.float32))
        assert rows.shape == (tiles, vision.config.patches, model.config.d_model)
        assert model.runs["tower"] == model.runs["projector"] == 2
        assert 0 < model.seconds["projector"] < model.seconds["tower"]
        assert vision.newline.shape == (model.config.d_model,)
        vision.close()
        assert not vision.sessions
