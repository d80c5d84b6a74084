"""A finished build takes the place of a bundle: killed at any step, one of the two answers; nobody's files are lost."""

import multiprocessing
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import export
import export.checkpoint
from engines.bundle import MANIFEST, STAMPS, Bundle, read_manifest
from engines.errors import BundleError
from engines.record import NEXT
from export import folder, swap
from export.build import make, plan
from export.options import BuildOptions
from tests.support.builds import content, published
from tests.support.cases import refused

STEPS = ("open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir")  # audit events of what changes a folder


@pytest.fixture(scope="module")
def states(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle, another one, and a folder with the first in which the other is built. Read only."""
    place = tmp_path_factory.mktemp("states")
    old = export.build(tiny_checkpoint, place / "old", "bf16", window=4)
    new = export.build(tiny_checkpoint, place / "new", window=8)
    between = Path(shutil.copytree(old, place / "between"))
    make(replace(plan(BuildOptions(tiny_checkpoint, between, window=8)), root=between / NEXT))
    return {"old": old, "new": new, "between": between}


def killed(root: Path, manifest: Any, step: int) -> bool:
    """Whether a process that publishes `manifest` was killed before its step number `step`."""

    def work() -> None:
        left = step

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal left
            if event in STEPS and not (event == "open" and args[1] in ("r", "rb", None)):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        swap.publish(root, manifest)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=work)  # type: ignore[attr-defined, unused-ignore]
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.slow
def test_killed_at_every_step_of_the_swap(states: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The old bundle answers until the manifest is replaced, the new one from then on; the next build settles it."""
    old, new = content(states["old"]), content(states["new"])
    manifest = Bundle.open(states["new"]).manifest
    answered = []
    for step in range(1000):
        root = Path(shutil.copytree(states["between"], tmp_path / "b"))
        if not killed(root, manifest, step):
            break
        bundle = Bundle.open(root)
        bundle.check()
        answered.append(bundle.manifest.precision)
        if answered[-1] == "bf16":
            assert {name: text for name, text in published(root).items() if name in old} == old
        else:
            assert bundle.manifest.files == manifest.files and bundle.identity == Bundle.open(states["new"]).identity
        folder.refuse_foreign_files(root, force=True)
        swap.settle(root)
        assert published(root).items() >= (new if answered[-1] == "fp32" else old).items()
        if step % 20 == 0:
            export.build(tiny_checkpoint, root, window=8, force=True)
            assert content(root) == new
        shutil.rmtree(root)
    assert content(root) == new and answered == sorted(answered) and len(set(answered)) == 2
    assert len(answered) > 100, "steps were counted"


def test_a_reader_in_between(states: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the moment the manifest is replaced, before any file has its place, the new bundle is whole."""
    root = Path(shutil.copytree(states["between"], tmp_path / "b"))
    manifest = Bundle.open(states["new"]).manifest
    with monkeypatch.context() as patch:
        patch.setattr(swap, "settle", lambda root: None)
        swap.publish(root, manifest)
    bundle = Bundle.open(root)
    bundle.check()
    assert bundle.file("config.json") == root / NEXT / "config.json"
    assert bundle.identity == Bundle.open(states["new"]).identity
    assert bundle.rebuild() == Bundle.open(states["new"]).rebuild().replace(str(states["new"]), str(root))
    swap.settle(root)
    assert content(root) == content(states["new"])
    swap.settle(root)
    assert content(root) == content(states["new"]), "a second time changes nothing"


def test_unchanged_parts_are_linked(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A rebuild needs disk for what differs: with another window that is no weight file."""
    root = export.build(tiny_checkpoint, tmp_path / "b")
    before = {path.name: path.stat().st_ino for path in root.glob("onnx/*")}
    export.build(tiny_checkpoint, root, window=8, force=True)
    same = {path.name for path in root.glob("onnx/*") if before.get(path.name) == path.stat().st_ino}
    assert {"embed.safetensors", "layer_00.safetensors", "layer_01.safetensors", "head.safetensors"} <= same
    assert all(path.stat().st_nlink == 1 for path in root.rglob("*") if path.is_file()), "none has a second name"


def test_a_killed_build_is_no_danger_to_the_bundle(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had linked from the bundle is not written through by the next build."""
    root = export.build(tiny_checkpoint, tmp_path / "b")
    before = content(root)
    shutil.copytree(root / "onnx", root / NEXT / "onnx", copy_function=os.link)
    shutil.copytree(root / STAMPS, root / NEXT / STAMPS, copy_function=os.link)
    os.link(root / "config.json", root / NEXT / "config.json")
    monkeypatch.setattr(sys.modules["export.swap"], "publish", lambda root, manifest: None)
    export.build(tiny_checkpoint, root, "fp16", window=4, weights="int8", force=True)
    assert published(root) == before


def test_only_files_below_a_bundle_are_its_own(tmp_path: Path) -> None:
    root = tmp_path / "b"
    (root / "onnx").mkdir(parents=True)
    (root / "link").symlink_to(tmp_path)
    names = ["onnx/a", "onnx", "../secret", "/etc/hostname", "", ".", "a\0b", "link/secret"]
    (root / MANIFEST).write_text(
        '{"format": "elastic-bundle", "files": {' + ", ".join(f"{name!r}: {{}}" for name in names).replace("'", '"')
        .replace("\\x00", "\\u0000") + "}}"
    )  # fmt: skip
    assert swap.owned(root) == {MANIFEST, "onnx/a"}
    (root / MANIFEST).write_text('{"files": {"onnx/a": {}}}')
    assert swap.owned(root) == set(), "the manifest of something else"


def test_a_file_system_without_links(
    states: dict[str, Path], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(states["old"], tmp_path / "b"))

    def none(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    export.build(tiny_checkpoint, root, window=8, force=True)
    assert content(root) == content(states["new"])


def test_settling_what_is_no_bundle(tmp_path: Path) -> None:
    swap.settle(tmp_path)
    assert not list(tmp_path.iterdir())
    with refused(BundleError, "is no bundle"):
        read_manifest(tmp_path)
