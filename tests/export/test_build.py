"""Building: what a bundle holds, what is made again, and a build that is interrupted anywhere."""

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import export
import export.checkpoint
import runtime
from engines.bundle import MANIFEST, Bundle
from engines.errors import BackendError, BundleError, CheckpointError, OptionError
from tests.support.builds import content, forked, full_after, logits, published
from tests.support.cases import DRIFT_PARTS, refused, sentence

KILLS = int(os.environ.get("KILL_BUILDS", "2"))  # of each kind of build


def ages(folder: Path) -> dict[str, int]:
    """When each file was last written."""
    return {p.name: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_same_input_same_bytes(text_checkpoint: Path, text_bundle: Path, tmp_path: Path) -> None:
    again = export.build(str(text_checkpoint), str(tmp_path / "deep" / "down"))
    assert again == tmp_path / "deep" / "down"
    assert content(again) == content(text_bundle)


def test_no_back_end_is_no_back_end(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = export.build(tiny_checkpoint, tmp_path / "b", backends=[])
    assert Bundle.open(bundle).manifest.engines == {}


def test_progress_names_each_part(tiny_checkpoint: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    export.build(tiny_checkpoint, tmp_path / "b", progress=lambda *event: seen.append(event))
    names = ("embed", "layer_00", "layer_01", "head", "tests_row", "tests_head", "probe")
    on_the_cpu = ("embed", "layer_00", "layer_01", "head", "attention", *DRIFT_PARTS, "probe", "reuse")
    exported = [(f"onnx/{name}", i, 7) for i, name in enumerate(names, 1)]
    assert seen == exported + [(f"onnx/{name}", i, 9) for i, name in enumerate(on_the_cpu, 1)]


def test_checkpoints_that_are_none(tmp_path: Path) -> None:
    for place in (tmp_path / "nothing", "x" * 5000):
        with refused(CheckpointError, str(place), "not a directory", "config.json"):
            export.build(place, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_out_is_not_the_checkpoint(tiny_checkpoint: Path) -> None:
    before = content(tiny_checkpoint)
    with refused(OptionError, "--out", str(tiny_checkpoint)):
        export.build(tiny_checkpoint, tiny_checkpoint / ".." / tiny_checkpoint.name)
    assert content(tiny_checkpoint) == before


def test_without_the_packages_of_a_build(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "export.part", None)
    with refused(BackendError, "export.part", "not installed", "pip install", "export"):
        export.build(tiny_checkpoint, tmp_path / "b")


def test_up_to_date(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written, not even a lock, so that a read-only disk is no obstacle."""
    bundle = export.build(tiny_checkpoint, tmp_path / "b")
    before = ages(bundle)
    monkeypatch.setattr(sys.modules["export.build"], "make", lambda job: pytest.fail("built again"))
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: pytest.fail("removed a file"))
    monkeypatch.setattr(sys.modules["export.build"], "locked", lambda root: pytest.fail("took the lock"))
    began = time.perf_counter()
    assert export.build(tiny_checkpoint, bundle) == bundle
    assert time.perf_counter() - began < 1
    assert ages(bundle) == before


@pytest.mark.slow
def test_finished_parts_are_taken_up(text_checkpoint: Path, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an unfinished build only the graph that is not there is made."""
    (bundle_copy / MANIFEST).unlink()
    (bundle_copy / "onnx" / "layer_01.onnx").unlink()
    made: list[str] = []
    from export import part as parts

    real = parts.save_graph

    def noted(path: Path, target: Any, part: str, weights: Any) -> Any:
        made.append(part)
        return real(path, target, part, weights)

    monkeypatch.setattr(parts, "save_graph", noted)
    export.build(text_checkpoint, bundle_copy)
    assert made == ["layer_01"]


def test_an_added_back_end_keeps_the_bundle(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle stays usable while engines are added, and if that fails."""
    bundle = export.build(tiny_checkpoint, tmp_path / "b", "fp16", backends=[])
    before = content(bundle)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("engines.weights.writer", full)
        with refused(BundleError, str(bundle), "No space left on device", "--out"):
            export.build(tiny_checkpoint, bundle, "fp16")
    assert published(bundle) == before
    Bundle.open(bundle).check()
    export.build(tiny_checkpoint, bundle, "fp16")
    whole = export.build(tiny_checkpoint, tmp_path / "whole", "fp16")
    assert content(bundle) == content(whole)
    export.build(tiny_checkpoint, bundle, "fp16", backends=[])  # asks for less: stays as it is
    assert content(bundle) == content(whole)


@pytest.mark.slow
def test_generation_defaults_become_the_bundles(text_checkpoint: Path, tmp_path: Path) -> None:
    """Changed defaults are taken up by the next build, which makes no part anew."""
    checkpoint = Path(shutil.copytree(text_checkpoint, tmp_path / "c"))
    bundle = export.build(checkpoint, tmp_path / "b", window=16)
    before = Bundle.open(bundle).manifest
    (checkpoint / "generation_config.json").write_text('{"elastic": {"threshold": 0.7, "window": 32, "max_masks": 64}}')
    after = Bundle.open(export.build(checkpoint, bundle, window=16)).manifest
    assert before.defaults == {"window": 16}, "what the checkpoint leaves out the runtime has"
    assert after.defaults == before.defaults | {"threshold": 0.7, "max_masks": 64, "window": 16}, "within the capacity"
    assert after.parts == before.parts
    assert Bundle.open(export.build(checkpoint, tmp_path / "wide")).capacity.window == 32, "room for its own window"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "files", "step"), [("fp32", 2 * (4 + 13) + 4, 5), ("fp16", 2 * (14 + 9) + 4, 11)]
)
def test_a_disk_that_is_full_at_any_file(
    tiny_checkpoint: Path, tmp_path: Path, precision: str, files: int, step: int
) -> None:
    """Whichever file does not fit: one sentence, nothing loads, and with room the same build completes.

    The record, weights, graphs and stamps of the parts, config.json and its stamp, and the manifest.
    """
    whole = content(export.build(tiny_checkpoint, tmp_path / "whole", precision))
    for left in range(0, 1000, step):
        out = tmp_path / f"b{left}"
        try:
            with full_after(left):
                export.build(tiny_checkpoint, out, precision)
        except BundleError as error:
            sentence(str(error), str(out), "No space left on device", "GB", "--out", "goes on where it stopped")
        else:
            break
        with refused(BundleError, "not finished", f"--checkpoint {tiny_checkpoint}" if left else "from its checkpoint"):
            runtime.load(out)
        export.build(tiny_checkpoint, out, precision)
        assert {n: c for n, c in content(out).items() if not n.endswith(".tmp")} == whole
        shutil.rmtree(out)
    assert left - step < files <= left, "all of the build was tried"


@pytest.mark.slow
def test_a_disk_that_is_full_while_replacing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The old bundle stays as it was until the new one is whole."""
    new = content(export.build(tiny_checkpoint, tmp_path / "new", window=8))
    swapped = []
    for left in range(50):
        out = export.build(tiny_checkpoint, tmp_path / f"b{left}", "fp16")
        old = content(out)
        try:
            with full_after(left):
                export.build(tiny_checkpoint, out, window=8, force=True)
        except BundleError as error:
            sentence(str(error), "No space left on device")
        else:
            break
        Bundle.open(out).check()
        swapped.append(Bundle.open(out).manifest.precision == "fp32")
        assert swapped[-1] or {n: c for n, c in published(out).items() if not n.endswith(".tmp")} == old
        export.build(tiny_checkpoint, out, window=8, force=True)
        assert content(out) == new
        shutil.rmtree(out)
    assert 20 < left < 49 and swapped == sorted(swapped) and swapped.count(True) == 1, "its second manifest was full"


@pytest.mark.slow
@pytest.mark.parametrize("kind", range(3))
def test_killed_builds(tiny_checkpoint: Path, tmp_path: Path, undisturbed: np.ndarray, kind: int) -> None:
    """SIGKILL anywhere: a bundle that was there answers, or the new one does; the same build again completes.

    Of three builds the first has an empty folder, the second replaces a bundle of
    the same checkpoint with other options, the third adds a back end. KILL_BUILDS
    sets how many of each are killed; a build that ended before its kill does not
    count. Every second kill falls into the last part, where files take their places.
    """
    out = prepared(tiny_checkpoint, tmp_path / "timed", kind)
    began = time.perf_counter()
    process = forked(tiny_checkpoint, out, force=kind == 1)
    process.join(240)
    took = time.perf_counter() - began
    assert process.exitcode == 0
    rng = random.Random(20251014 + kind)
    killed = answered = drawn = 0
    while killed < KILLS:
        drawn += 1
        assert drawn < 30 + 20 * KILLS, "the kills came too late to mean anything"
        out = prepared(tiny_checkpoint, tmp_path / f"b{drawn}", kind)
        process = forked(tiny_checkpoint, out, force=kind == 1)
        time.sleep(took * (rng.random() if killed % 2 else rng.uniform(0.7, 1.0)))
        process.kill()
        process.join(240)
        took *= 0.8 if process.exitcode == 0 else 1.0  # the first build was slower than this one
        if process.exitcode == -signal.SIGKILL:
            killed += 1
            loads = answers(out, undisturbed, kind)
            answered += loads
            assert loads or kind == 0, f"kill {killed} lost the bundle"
            export.build(tiny_checkpoint, out, force=kind == 1)
            assert np.array_equal(logits(out), undisturbed), f"kill {killed}"
        shutil.rmtree(out)
    print(f"build {kind}: of {drawn} builds {killed} killed, {answered} left a bundle that answers; {took:.2f} s each")


def prepared(checkpoint: Path, out: Path, kind: int) -> Path:
    if kind == 1:
        return export.build(checkpoint, out, "bf16", window=4)
    return export.build(checkpoint, out, backends=[]) if kind == 2 else out


def answers(out: Path, undisturbed: np.ndarray, kind: int) -> bool:
    """Whether the folder loads: if so, every file is checked, and the logits are those of one of the two bundles."""
    try:
        bundle = Bundle.open(out)
        bundle.check()
    except BundleError as error:
        sentence(str(error), str(out), "build")
        return False
    if bundle.manifest.precision == "bf16":  # the old bundle, not yet replaced
        assert kind == 1 and bundle.capacity.window == 4 and np.abs(logits(out) - undisturbed).max() > 0
    elif bundle.manifest.engines:
        assert np.array_equal(logits(out), undisturbed)
    else:
        assert kind == 2
    return True


def test_an_unfinished_manifest_is_none(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Killed while the manifest was written: it lies beside its place."""
    bundle = export.build(tiny_checkpoint, tmp_path / "b")
    before = content(bundle)
    raw = (bundle / MANIFEST).read_bytes()
    (bundle / MANIFEST).rename(bundle / f"{MANIFEST}.tmp")
    (bundle / f"{MANIFEST}.tmp").write_bytes(raw[:100])
    with refused(BundleError, "not finished"):
        runtime.load(bundle)
    export.build(tiny_checkpoint, bundle)
    assert content(bundle) == before


def test_tools_are_recorded(golden_bundle: Path) -> None:
    tools = json.loads((golden_bundle / MANIFEST).read_text())["tools"]
    assert {"python", "torch", "onnx", "onnxruntime", "numpy"} <= set(tools) and all(tools.values())
