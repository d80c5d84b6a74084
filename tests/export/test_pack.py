"""A pack: what a deployment needs of a bundle, as a bundle that answers alike."""

import shutil
from pathlib import Path

import pytest

import export
import export.cli
import runtime
from engines.bundle import MANIFEST, Bundle
from engines.errors import BundleError, OptionError
from export.pack import pack
from tests.support.builds import content, full_after
from tests.support.cases import refused
from tests.support.commands import Call, failed

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def bundle(text_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle in fp16 with int8 engines: ONNX Runtime reads none of the exported files. Read only."""
    out = tmp_path_factory.mktemp("pack") / "bundle"
    return Bundle.open(export.build(text_checkpoint, out, "fp16", weights="int8"))


def size(folder: Path) -> int:
    return sum(len(text) for text in content(folder).values())


@pytest.mark.parametrize("backend", ["onnxruntime", "eager"])
def test_a_pack_answers_as_the_bundle(backend: str, bundle: Bundle, tmp_path: Path) -> None:
    out = pack(bundle, [backend], tmp_path / "deep" / "pack")
    packed = Bundle.open(out)
    assert set(content(out)) == {*packed.manifest.files, MANIFEST} == {*bundle.files_for(
        None if backend == "eager" else backend), MANIFEST}  # fmt: skip
    packed.check()
    assert (packed.config, packed.capacity) == (bundle.config, bundle.capacity)
    assert packed.manifest.defaults == bundle.manifest.defaults
    with runtime.load(bundle.root, backend, threads=1) as whole, runtime.load(out, backend, threads=1) as part:
        assert part.generate(PROMPT, gen_length=12).ids == whole.generate(PROMPT, gen_length=12).ids
        assert part.text.encode("ab").tolist() == whole.text.encode("ab").tolist()
    assert list(out.parent.iterdir()) == [out]


def test_a_pack_is_smaller(bundle: Bundle, tmp_path: Path) -> None:
    out = pack(bundle, ["onnxruntime"], tmp_path / "pack")
    assert not any(name.startswith(("onnx/", "stamps/")) for name in content(out))
    assert size(out) < 0.6 * size(bundle.root)
    both = pack(bundle, ["onnxruntime", "eager"], tmp_path / "both")
    assert size(out) < size(both) < size(bundle.root)


def test_a_pack_has_no_other_back_end(bundle: Bundle, tmp_path: Path) -> None:
    out = pack(bundle, ["onnxruntime"], tmp_path / "pack")
    with runtime.load(out, threads=1) as model:
        assert model.backend == "onnxruntime"
    with refused(BundleError, str(out), "is a pack without the exported parts", "the bundle that it was made from"):
        runtime.load(out, "eager")
    with refused(BundleError, "no engines for onnxruntime"):
        runtime.load(pack(bundle, ["eager"], tmp_path / "eager"), "onnxruntime")


# Refused


def test_what_cannot_be_packed(bundle: Bundle, tmp_path: Path) -> None:
    with refused(BundleError, "no engines for tensorrt, only for onnxruntime"):
        pack(bundle, ["tensorrt"], tmp_path / "pack")
    with refused(OptionError, "unknown back end 'gpu'", "onnxruntime"):
        pack(bundle, ["gpu"], tmp_path / "pack")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    for out in (tmp_path / "full", tmp_path / "full" / "letter.txt"):
        with refused(OptionError, str(out), "not an empty folder", "another --out"):
            pack(bundle, ["onnxruntime"], out)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "letter.txt"]


def test_a_damaged_file(bundle: Bundle, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle.root, tmp_path / "copy"))
    (copy / "tokenizer.json").write_text("{}")
    with refused(BundleError, "tokenizer.json", "SHA-256"):
        pack(Bundle.open(copy), ["onnxruntime"], tmp_path / "pack")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_full_disk_leaves_nothing(bundle: Bundle, tmp_path: Path) -> None:
    with full_after(3), refused(BundleError, "cannot write", "No space left", "another --out"):
        pack(bundle, ["onnxruntime"], tmp_path / "pack")
    assert list(tmp_path.iterdir()) == []


def test_the_command(call: Call, bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    code, printed, err = call(
        export.cli.main, "pack", bundle.root, "--backend", "onnxruntime", "--out", tmp_path / "pack"
    )
    assert (code, err) == (0, "") and f"[ok] {tmp_path / 'pack'}" in printed and "files" in printed
    failed(call(export.cli.main, "pack", bundle.root, "--backend", "onnxruntime", "--out", tmp_path / "pack"), 2,
           "not an empty folder")  # fmt: skip
    assert call(export.cli.main, "inspect", tmp_path / "pack")[0] == 0
