"""What a build will write is known before it writes: the disk it needs, and whether that is there."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import export
from engines.errors import BundleError
from engines.files import check_space
from export.build import DEMO, plan
from export.estimate import estimate
from export.options import BuildOptions
from tests.support.cases import DATA, GOLDEN, refused
from tests.support.vision import CHECKPOINT


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpoint", "options"),
    [(GOLDEN, {}), (GOLDEN, {"precision": "fp16"}), (GOLDEN, {"precision": "bf16", "weights": "int8"}),
     (GOLDEN, {"weights": "int4"}), (GOLDEN, {"precision": "fp16", "backends": []}),
     (DATA / "dream-tiny", {"precision": "fp16", "weights": "int4", "max_length": 64}),
     (CHECKPOINT, {"precision": "fp16", "max_length": 64})],
)  # fmt: skip
def test_the_estimate_is_near(checkpoint: Path, options: dict[str, Any], tmp_path: Path) -> None:
    """Of all files, graphs and texts too: within 5 %, however small the model is."""
    needed = estimate(plan(BuildOptions(checkpoint, tmp_path / "b", **options)))["disk"]
    written = size(export.build(checkpoint, tmp_path / "b", **options))
    print(f"{options}: {needed} estimated, {written} written")
    assert abs(needed / written - 1) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"precision": "bf16"}, {"weights": "int4"}])
def test_the_estimate_of_the_demo(options: dict[str, Any], tmp_path: Path) -> None:
    needed = estimate(plan(BuildOptions(DEMO, tmp_path / "b", **options)))["disk"]
    assert abs(needed / size(export.build(DEMO, tmp_path / "b", **options)) - 1) < 0.05


@pytest.mark.slow
def test_the_estimate_of_tensorrt(tmp_path: Path) -> None:
    """Plans take most of a small bundle; for both back ends within 20 %."""
    pytest.importorskip("tensorrt_rtx")
    options: dict[str, Any] = {
        "precision": "fp16", "backends": ["onnxruntime", "tensorrt"], "flavour": "tensorrt_rtx",
        "capabilities": ["8.9"], "max_length": 600,
    }  # fmt: skip
    needed = estimate(plan(BuildOptions(DEMO, tmp_path / "b", **options)))["disk"]
    written = size(export.build(DEMO, tmp_path / "b", **options))
    print(f"{needed} estimated, {written} written")
    assert abs(needed / written - 1) < 0.2


def test_a_disk_that_is_too_small(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found before anything is written."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 1000, 1000))
    out = tmp_path / "deep" / "b"
    with refused(BundleError, str(out), "GB of disk", "0.000 GB are free", "another --out"):
        export.build(tiny_checkpoint, out)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_needs_no_more_space(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = export.build(tiny_checkpoint, tmp_path / "b")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 30_000, 30_000))
    assert export.build(tiny_checkpoint, out) == out


@pytest.mark.parametrize("below", [".", "b", "deep/down/b"])
def test_space_is_that_of_the_disk_which_a_folder_will_be_on(below: str, tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_space(tmp_path / below, free // 2)
    with refused(BundleError, str(tmp_path / below), "are free there"):
        check_space(tmp_path / below, 2 * free)
