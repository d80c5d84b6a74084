"""The folder a bundle is built in: what may lie there, one build at a time, a folder that cannot be written."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import export
import export.checkpoint
import runtime
from engines.bundle import MANIFEST, VERSION, Bundle
from engines.defaults import CALIBRATION, set_defaults
from engines.errors import BundleError, NewerBundleError
from engines.locks import LOCK, locked
from export import folder
from export.build import plan
from export.folder import differences
from export.options import BuildOptions
from tests.support.builds import content, forked, logits, published
from tests.support.cases import edit_manifest, refused


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"window": 8}, {"track_num": 2}, {"max_length": 128}, {"precision": "fp16"}, {"max_batch": 2},
     {"precision": "bf16", "window": 3}],
)  # fmt: skip
def test_other_options_need_force(tiny_checkpoint: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    bundle = export.build(tiny_checkpoint, tmp_path / "b")
    before = content(bundle)
    with refused(BundleError, str(bundle), "with other options", *options, "--out", "--force"):
        export.build(tiny_checkpoint, bundle, **options)
    assert content(bundle) == before, "nothing was lost"
    fresh = export.build(tiny_checkpoint, tmp_path / "fresh", **options)
    export.build(tiny_checkpoint, bundle, **options, force=True)
    assert content(bundle) == content(fresh), "and nothing of the old one is left"


def test_another_checkpoint_needs_force(tiny_checkpoint: Path, bundle_copy: Path, tmp_path: Path) -> None:
    before = content(bundle_copy)
    with refused(BundleError, str(bundle_copy), "of another checkpoint", "--out", "--force"):
        export.build(tiny_checkpoint, bundle_copy)
    assert content(bundle_copy) == before
    export.build(tiny_checkpoint, bundle_copy, force=True)
    fresh = export.build(tiny_checkpoint, tmp_path / "fresh")
    assert Bundle.open(bundle_copy).manifest == Bundle.open(fresh).manifest
    export.build(tiny_checkpoint, bundle_copy)  # what is left of the old tokenizer is not in the way


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "manifest.json", "onnx", "tokenizer.json"])
def test_files_of_others_are_not_touched(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / name).write_text("mine")
    with refused(BundleError, str(out), name, "--out", *["--force"] * (name == "notes.txt")):
        export.build(tiny_checkpoint, out)
    assert content(out) == {name: b"mine"}
    if name == "notes.txt":
        export.build(tiny_checkpoint, out, force=True)
        export.build(tiny_checkpoint, out, "fp16", window=4, force=True)
        Bundle.open(out).check()
        assert (out / name).read_text() == "mine"
        return
    with refused(BundleError, str(out), f"holds {name}, which no build wrote", "--out"):
        export.build(tiny_checkpoint, out, force=True)
    assert content(out) == {name: b"mine"}, "a file in the way is not written over"


def test_files_of_others_in_a_bundle_are_kept(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Beside the files that builds wrote, in their folders and under names that a later build would use."""
    out = export.build(tiny_checkpoint, tmp_path / "b")
    (out / "onnx" / "notes.txt").write_text("mine")
    export.build(tiny_checkpoint, out, "fp16", window=4, force=True)
    assert (out / "onnx" / "notes.txt").read_text() == "mine"
    (out / "onnx" / "layer_00.cpu.onnx").write_text("mine")
    before = content(out)
    with refused(BundleError, str(out), "onnx/layer_00.cpu.onnx, which no build wrote", "move it away"):
        export.build(tiny_checkpoint, out, force=True)
    assert published(out) == before
    Bundle.open(out).check()


@pytest.mark.slow
def test_a_newer_bundle_needs_force(text_checkpoint: Path, bundle_copy: Path) -> None:
    edit_manifest(bundle_copy, lambda m: m.update(version=VERSION + 1))
    before = content(bundle_copy)
    with refused(NewerBundleError, str(bundle_copy), f"version {VERSION + 1}", "update"):
        export.build(text_checkpoint, bundle_copy)
    assert content(bundle_copy) == before
    export.build(text_checkpoint, bundle_copy, force=True)
    Bundle.open(bundle_copy).check()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manifest.json", "config.json", "onnx/layer_01.safetensors", "onnx/head.onnx"])
@pytest.mark.parametrize("damage", ["flipped", "missing", "cut"])
def test_damage_is_mended(text_checkpoint: Path, text_bundle: Path, bundle_copy: Path, name: str, damage: str) -> None:
    """The remedy that the error names works, without --force."""
    path = bundle_copy / name
    raw = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(raw[:-7] if damage == "cut" else raw[:9] + bytes([raw[9] ^ 1]) + raw[10:])
    with pytest.raises(BundleError):
        runtime.load(bundle_copy)
    export.build(text_checkpoint, bundle_copy)
    assert content(bundle_copy) == content(text_bundle)


def test_what_is_built_again_is_as_it_was(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A build that names neither the engines that are there nor their options mends them, and keeps a calibration."""
    bundle = export.build(tiny_checkpoint, tmp_path / "b", weights="int8")
    set_defaults(bundle, {"gamma": 0.5}, CALIBRATION, {"trials": []})
    before = content(bundle)
    (bundle / "engines/onnxruntime/layer_01.int8.data").write_bytes(b"damaged")
    export.build(tiny_checkpoint, bundle, backends=[])
    after = content(bundle)
    assert json.loads(after.pop(MANIFEST)) == json.loads(before.pop(MANIFEST)) and after == before
    assert Bundle.open(bundle).manifest.defaults["gamma"] == 0.5


def test_engines_with_other_options_need_force(tiny_checkpoint: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(export.build(tiny_checkpoint, tmp_path / "b", max_batch=1)).manifest
    manifest = replace(manifest, engines={"any": {"flavour": "one", "capabilities": ["8.9"]}})

    def other(**options: Any) -> list[str]:
        job = plan(BuildOptions(tiny_checkpoint, tmp_path / "b", backends=[], max_batch=1))
        return differences(replace(job, options=replace(job.options, backends=["any"], **options)), manifest)

    assert other() == other(flavour="one") == other(flavour="one", capabilities=["8.9"]) == []
    assert other(flavour="other") == ["any flavour one"]
    assert other(capabilities=["9.0"], precision="fp16") == ["precision fp32", "any capabilities ['8.9']"]


def test_one_build_at_a_time(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    out.mkdir()
    (out / LOCK).write_text("")
    with locked(out), refused(BundleError, "another build", str(out), "wait"):
        export.build(tiny_checkpoint, out)
    assert list(out.iterdir()) == [out / LOCK]
    Bundle.open(export.build(tiny_checkpoint, out)).check()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: Any, number: int) -> None:
    def none(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", none)
    with refused(BundleError, str(tmp_path / "b"), "a file system without locks", os.strerror(number)):
        export.build(tiny_checkpoint, tmp_path / "b")


def test_a_damaged_bundle_is_not_replaced_by_another(
    tiny_checkpoint: Path, text_checkpoint: Path, bundle_copy: Path
) -> None:
    """Not even where its manifest cannot be read: the error has the command that mends it."""
    (bundle_copy / MANIFEST).write_bytes(b"{")
    before = content(bundle_copy)
    command = f"--checkpoint {text_checkpoint} --backend onnxruntime --out {bundle_copy}`"
    with refused(BundleError, f"a damaged bundle of {text_checkpoint}", command, "--force"):
        export.build(tiny_checkpoint, bundle_copy)
    assert content(bundle_copy) == before
    export.build(tiny_checkpoint, bundle_copy, force=True)
    Bundle.open(bundle_copy).check()


def test_builds_racing(tiny_checkpoint: Path, tmp_path: Path, undisturbed: np.ndarray) -> None:
    """Each of three processes builds or is told to wait; the bundle is whole."""
    out = tmp_path / "b"
    racers = [forked(tiny_checkpoint, out) for _ in range(3)]
    for racer in racers:
        racer.join(240)
    assert {racer.exitcode for racer in racers} <= {0, 7} and 0 in {racer.exitcode for racer in racers}
    assert np.array_equal(logits(out), undisturbed)


def test_a_folder_that_cannot_be_made(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out, reason in (("file", "File exists"), ("file/below", "Not a directory"), ("x" * 300, "name too long")):
        with refused(BundleError, str(tmp_path / out), reason, "writable", "--out"):
            export.build(tiny_checkpoint, tmp_path / out)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_may_not_be_written(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", denied)
    with refused(BundleError, str(tmp_path / "b"), "Permission denied", "writable", "--out"):
        export.build(tiny_checkpoint, tmp_path / "b")


# What looks changes nothing


def test_reading_a_folder_changes_nothing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Neither the folder nor the planned build, whether or not a bundle lies there."""
    root = export.build(tiny_checkpoint, tmp_path / "b", weights="int8")
    set_defaults(root, {"gamma": 0.5}, CALIBRATION, {"trials": []})
    before = content(root)
    job = plan(BuildOptions(tiny_checkpoint, root, backends=[]))
    wanted = vars(job).copy()
    bundle = folder.existing_bundle(job)
    assert bundle is not None and folder.differences(job, bundle.manifest) == [] and folder.is_whole(job, bundle)
    folder.refuse_other_bundle(job, bundle)
    folder.refuse_foreign_files(root, False)
    assert list(folder.calibration(bundle)) == [CALIBRATION]
    grown = folder.extended(job.options, bundle.manifest)
    assert (grown.backends, grown.weights) == (["onnxruntime"], "int8"), "as the engines that are there were compiled"
    assert (job.options.backends, job.options.weights) == ([], None)
    assert content(root) == before and vars(job) == wanted and job.files == {} == job.parts
    (root / MANIFEST).unlink()
    before = content(root)
    assert folder.existing_bundle(job) is None and content(root) == before
