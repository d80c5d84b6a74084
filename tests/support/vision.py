"""Published data of LLaDA-V: its images, prompts and stored tensors, and the towers' geometry."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray

from engines.config import VisionConfig
from tests.support.goldens import DATA

GOLDEN = DATA / "llada-v"
CHECKPOINT = GOLDEN / "llada-v-tiny"
CASES = {"gradient": "gradient_square", "checker": "checker_wide", "waves": "waves_tall", "stripes": "stripes_wide"}
FILES = {case: GOLDEN / "images" / f"{name}.png" for case, name in CASES.items()}
NEWER = int(PIL.__version__.split(".")[0]) >= 13  # resizes both sides at once with another rounding


def tower(side: int) -> VisionConfig:
    """The published tower's geometry, for tiles of `side` pixels."""
    sides = [(side * i, side * j) for i in range(1, 7) for j in range(1, 7)]
    return VisionConfig(side, 14, 3, 2, 48, 4, 128, 1e-6, 0.5, 0.5, tuple(sides), 4, "<image>")


TINY, REAL = tower(56), tower(384)


def prompts() -> dict[str, Any]:
    """The published prompts by case."""
    cases: dict[str, Any] = json.loads((GOLDEN / "prompts.json").read_text())["cases"]
    return cases


def close(name: str, came: NDArray[Any], wanted: NDArray[Any], atol: float) -> None:
    """Assert that two arrays agree; prints the largest and the mean difference."""
    assert came.shape == wanted.shape, name
    gap = np.abs(came - wanted)
    print(f"{name}: max {gap.max():.1e} mean {gap.mean():.1e}")
    assert gap.max() <= atol, name


def copy_checkpoint(tmp_path: Path, **changes: Any) -> Path:
    """A copy of the golden checkpoint and its tower's config, with `changes` of its config.json."""
    shutil.copytree(GOLDEN / "siglip-tiny-patch14-56", tmp_path / "siglip-tiny-patch14-56")
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "llada-v-tiny"))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    return folder
