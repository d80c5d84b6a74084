"""The command that builds a bundle again: it is complete and works, or it is not given."""

import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import export
import export.checkpoint
import runtime
from engines.bundle import MANIFEST, Bundle
from engines.errors import BundleError
from engines.record import NEXT, RECORD, Record, read_record, rebuild
from export.cli import main
from tests.support.builds import content, full_after
from tests.support.cases import edit_manifest


def run_the_remedy(root: Path, backend: str = "onnxruntime") -> str:
    """Load a bundle, which fails; run the command that the error prints, and load it again. Returns the command."""
    with pytest.raises(BundleError) as caught:
        runtime.load(root, backend)
    (command,) = re.findall("`(.*)`", str(caught.value))
    python, dash, package, *arguments = shlex.split(command)
    assert (python, dash, package) == ("python", "-m", "export") and main(arguments) == 0
    runtime.load(root, backend).close()
    return str(command)


@pytest.fixture
def place(text_checkpoint: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint and a folder for its bundle, with names that a shell would take apart."""
    return Path(shutil.copytree(text_checkpoint, tmp_path / "the 'best' $MODEL")), tmp_path / "my bundle"


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a missing file": lambda root: (root / "onnx/layer_01.cpu.onnx").unlink(),
    "a damaged file": lambda root: (root / "onnx/layer_01.safetensors").write_bytes(b"x"),
    "a damaged record": lambda root: (root / "config.json").write_bytes(b"x"),
    "a damaged manifest": lambda root: (root / MANIFEST).write_bytes(b"{"),
    "no manifest": lambda root: (root / MANIFEST).unlink(),
    "an older version": lambda root: edit_manifest(root, lambda m: m.update(version=1)),
    "a part without an engine": lambda root: edit_manifest(
        root, lambda m: m["engines"]["onnxruntime"]["parts"].pop("layer_01")
    ),
    "a file that is not listed": lambda root: edit_manifest(root, lambda m: m["files"].pop("onnx/layer_01.cpu.onnx")),
    "a name outside": lambda root: edit_manifest(root, lambda m: m["files"].update({"../x": {}})),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_the_command_mends(place: tuple[Path, Path], damage: str) -> None:
    checkpoint, root = place
    export.build(checkpoint, root, window=8, max_length=128, track_num=2)
    before = content(root)
    DAMAGE[damage](root)
    command = run_the_remedy(root)
    for part in ("--window 8", "--max-length 128", "--track-num 2", shlex.quote(str(checkpoint))):
        assert part in command
    after = content(root)
    force = after.pop(RECORD) == before.pop(RECORD)
    assert force and after == before


@pytest.mark.slow
def test_the_command_adds_a_back_end(place: tuple[Path, Path]) -> None:
    checkpoint, root = place
    export.build(checkpoint, root, "fp16", window=8, backends=[])
    command = run_the_remedy(root)
    assert "--fp16 --window 8 --backend onnxruntime" in command
    assert content(root) == content(export.build(checkpoint, root.with_name("fresh"), "fp16", window=8))


@pytest.mark.slow
def test_the_command_finishes_a_build(place: tuple[Path, Path]) -> None:
    checkpoint, root = place
    with full_after(9), pytest.raises(BundleError):
        export.build(checkpoint, root, "bf16", weights="int8")
    assert (root / NEXT / RECORD).is_file() and "--bf16" in run_the_remedy(root)
    assert Bundle.open(root).engines("onnxruntime")["weights"] == "int8"


@pytest.mark.slow
def test_no_command_that_would_not_work(place: tuple[Path, Path]) -> None:
    checkpoint, root = place
    export.build(checkpoint, root)
    assert f"`python -m export build --checkpoint {shlex.quote(str(checkpoint))} " in rebuild(root)
    checkpoint.rename(checkpoint.with_name("moved"))
    assert rebuild(root) == "build it again from its checkpoint"
    (root / RECORD).write_bytes((root / RECORD).read_bytes().replace(b"onnxruntime", b"onnxruntimo"))
    assert read_record(root) is None
    for raw in (b"", b"[]", b'{"checkpoint": 1, "arguments": 2}'):
        (root / RECORD).write_bytes(raw)
        assert read_record(root) is None


def test_the_demo_has_no_path(tmp_path: Path) -> None:
    record = Record("demo", ("--fp16",), 64)
    assert record.command(tmp_path, "--force") == f"python -m export build --fp16 --force --out {tmp_path}"
    (tmp_path / RECORD).parent.mkdir()
    (tmp_path / RECORD).write_bytes(record.content())
    assert read_record(tmp_path) == record


def test_tensorrt_is_not_offered_where_it_cannot_be(text_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"no engines for tensorrt.*; TensorRT needs another bundle") as caught:
        Bundle.open(text_bundle).engines("tensorrt")
    assert "`" not in str(caught.value)


def test_another_package_brings_its_own_options() -> None:
    """Compute capabilities that one package was told would be refused by the other."""
    given = "--fp16", "--backend", "tensorrt", "--flavour", "tensorrt_rtx", "--capability", "8.6", "--capability", "8.9"
    command = Record("demo", given, 1024).command(Path("b"), "--flavour", "tensorrt", "--force")
    assert command == "python -m export build --fp16 --backend tensorrt --flavour tensorrt --force --out b"
