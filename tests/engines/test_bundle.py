"""The bundle on disk: whatever is not exactly what was built does not load, and says how to mend it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import export
import runtime
from engines.bundle import MANIFEST, VERSION, Bundle, inside, read_manifest
from engines.config import Capacity, ModelConfig, strict
from engines.errors import BundleError, NewerBundleError
from engines.files import sha256, signed
from engines.record import RECORD
from engines.weights import locate
from tests.support.cases import edit_manifest, refused

AGAIN = "build it again with `python -m export build --checkpoint"


def flip(path: Path, at: int, mask: int = 0xFF) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= mask
    path.write_bytes(content)


def test_a_checkpoint_in_place_of_a_bundle(text_checkpoint: Path) -> None:
    with refused(BundleError, "is a checkpoint and not a bundle", f"--checkpoint {text_checkpoint}"):
        Bundle.open(text_checkpoint)


def test_a_bundle_is_what_it_says(golden_bundle: Path) -> None:
    bundle = Bundle.open(str(golden_bundle))
    assert bundle.config.parts == ("embed", "layer_00", "layer_01", "layer_02", "layer_03", "head")
    assert bundle.capacity == Capacity(512, 32, 4, 16, 2 * 32 + 4 * 4)
    assert (bundle.config.mask_id, bundle.config.eos_id, bundle.manifest.precision) == (255, 250, "fp32")
    assert list(bundle.manifest.engines) == ["onnxruntime"]
    on_disk = {p.relative_to(golden_bundle).as_posix() for p in golden_bundle.rglob("*") if p.is_file()}
    assert on_disk == {*bundle.manifest.files, MANIFEST, ".lock"}, "every file is listed, so every file is checked"
    bundle.check()
    assert bundle.graph("layer_02").name == "layer_02.onnx"
    assert set(locate(bundle.weights("layer_02"))) > {"q_proj.weight", "attn_norm.weight"}


def test_the_manifest_describes_every_port(golden_bundle: Path) -> None:
    """What the manifest says of a part is what its graph has."""
    import onnx

    bundle = Bundle.open(golden_bundle)
    elements = {"fp32": "FLOAT", "int64": "INT64", "bool": "BOOL"}
    for name, part in bundle.manifest.parts.items():
        graph = onnx.load(str(bundle.graph(name)), load_external_data=False).graph
        for side, values in (("inputs", graph.input), ("outputs", graph.output)):
            found = [
                (v.name, onnx.TensorProto.DataType.Name(v.type.tensor_type.elem_type),
                 [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim])
                for v in values
            ]  # fmt: skip
            assert found == [(p["name"], elements[p["dtype"]], p["axes"]) for p in part[side]], (name, side)


def test_identity_names_the_content(golden_bundle: Path, text_bundle: Path, bundle_copy: Path) -> None:
    first, other, copy = (Bundle.open(b).identity for b in (golden_bundle, text_bundle, bundle_copy))
    assert first != other == copy
    edit_manifest(bundle_copy, lambda m: m["defaults"].update(gamma=0.8))
    assert Bundle.open(bundle_copy).identity != other


# Damage


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_flipped_byte_in_any_file(text_checkpoint: Path, tmp_path: Path, precision: str) -> None:
    """In each file that the back end reads three bytes, one after the other: the bundle does not load."""
    bundle = export.build(text_checkpoint, tmp_path / "bundle", precision)
    files = [bundle / name for name in (MANIFEST, *sorted(Bundle.open(bundle).files_for("onnxruntime")))]
    assert len(files) > 15 and {bundle / "config.json", bundle / "tokenizer.json"} < set(files)
    for path in files:
        size = path.stat().st_size
        remedy = AGAIN if path != bundle / RECORD else "build it again from its checkpoint"
        for at in {0, size // 2, size - 1}:
            flip(path, at)
            with refused(BundleError, str(bundle), path.name, remedy):
                runtime.load(bundle, "onnxruntime")
            flip(path, at)
    with runtime.load(bundle, "onnxruntime") as model:  # every byte is back
        assert model.logits([1, 2, 3]).shape == (1, 3, 264)


def test_every_back_end_checks_the_texts(bundle_copy: Path) -> None:
    flip(bundle_copy / "config.json", 5)
    for backend in ("eager", "onnxruntime", "auto"):
        with refused(BundleError, "config.json", "SHA-256", AGAIN):
            runtime.load(bundle_copy, backend)


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_back_end_reads_its_own_files_only(
    weights: str | None, text_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of another back end are not hashed, and so a damaged one does no harm."""
    bundle = export.build(text_checkpoint, tmp_path / "bundle", "fp16", weights=weights)
    hashed: list[str] = []

    def noted(path: Path) -> str:
        hashed.append(path.relative_to(bundle).as_posix())
        return sha256(path)

    monkeypatch.setattr("engines.bundle.sha256", noted)
    flip(bundle / "onnx/layer_00.safetensors", 200)
    with runtime.load(bundle, "onnxruntime", threads=1) as model:
        assert model.generate([3, 1, 4], gen_length=4).steps > 0
    texts = {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert len(set(hashed)) == len(hashed), "each file once"
    assert texts < set(hashed) and all("/" not in name or name.startswith("engines/onnxruntime/") for name in hashed)
    assert {f"engines/onnxruntime/{part}" in str(hashed) for part in ("embed", "layer_00", "head", "probe")} == {True}
    with refused(BundleError, "onnx/layer_00.safetensors", "SHA-256", AGAIN):
        runtime.load(bundle, "eager")


@pytest.mark.slow
@settings(max_examples=300)
@given(st.data())
def test_any_change_of_the_manifest(text_bundle: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Any other byte anywhere, even one that leaves the JSON's meaning as it was."""
    raw = (text_bundle / MANIFEST).read_bytes()
    copy = tmp_path_factory.mktemp("manifest")
    at = data.draw(st.integers(0, len(raw) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda b: b != raw[at]))
    (copy / MANIFEST).write_bytes(raw[:at] + bytes([byte]) + raw[at + 1 :])
    with pytest.raises(BundleError) as caught:
        read_manifest(copy)
    assert MANIFEST in str(caught.value) or "version" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [lambda raw: raw + b"\n", lambda raw: raw.replace(b"1e-05", b"1E-05"), lambda raw: raw[:-1],
     lambda raw: raw.replace(b'{\n "model"', b'{\n "window": 1,\n "model"'), lambda raw: raw[: len(raw) // 2],
     lambda raw: b"", lambda raw: b"[]", lambda raw: b'"x"', lambda raw: b"\xff\xfe", lambda raw: b"[" * 100_000],
)  # fmt: skip
def test_a_manifest_that_is_not_the_one_written(bundle_copy: Path, change: Callable[[bytes], bytes]) -> None:
    raw = (bundle_copy / MANIFEST).read_bytes()
    assert change(raw) != raw
    (bundle_copy / MANIFEST).write_bytes(change(raw))
    with refused(BundleError, MANIFEST, "damaged", AGAIN):
        runtime.load(bundle_copy)


def test_missing(bundle_copy: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "nothing", Path("x" * 5000)):
        with refused(BundleError, "there is no bundle", str(place), "`python -m export build --help`"):
            runtime.load(place)
    with refused(BundleError, "is a file", MANIFEST, "a bundle's folder"):
        runtime.load(bundle_copy / MANIFEST)
    with refused(BundleError, "is no bundle", str(tmp_path), "a bundle's folder"):
        runtime.load(tmp_path)
    (bundle_copy / "onnx" / "layer_01.cpu.onnx").unlink()
    with refused(BundleError, "layer_01.cpu.onnx is missing", AGAIN):
        runtime.load(bundle_copy)
    (bundle_copy / MANIFEST).unlink()
    with refused(BundleError, "not finished", AGAIN):
        runtime.load(bundle_copy)


def test_a_file_that_cannot_be_read(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("engines.bundle.sha256", broken)
    with refused(BundleError, str(bundle_copy), "cannot be read", "Input/output error", AGAIN):
        runtime.load(bundle_copy)


# Versions and keys


def test_versions(bundle_copy: Path) -> None:
    edit_manifest(bundle_copy, lambda m: m.update(version=VERSION + 1))
    with refused(NewerBundleError, str(bundle_copy), f"version {VERSION + 1}", f"reads {VERSION}", "update"):
        runtime.load(bundle_copy)
    assert issubclass(NewerBundleError, BundleError)
    edit_manifest(bundle_copy, lambda m: m.update(version=VERSION - 1))
    with refused(BundleError, f"version {VERSION - 1}", AGAIN):
        runtime.load(bundle_copy)
    for wrong in ({"version": "1"}, {"version": VERSION, "format": "another"}):
        edit_manifest(bundle_copy, lambda m, wrong=wrong: m.update(wrong))  # type: ignore[misc]
        with refused(BundleError, MANIFEST, "not a manifest", AGAIN):
            runtime.load(bundle_copy)


@pytest.mark.parametrize(
    ("change", "key"),
    [(lambda m: m.update(colour=1), "colour"), (lambda m: m.pop("defaults"), "defaults"),
     (lambda m: m["model"].update(colour=1), "colour"), (lambda m: m["model"].pop("eos_id"), "eos_id"),
     (lambda m: m["capacity"].update(colour=1), "colour"), (lambda m: m["capacity"].pop("rows"), "rows")],
)  # fmt: skip
def test_unknown_and_missing_keys(bundle_copy: Path, change: Callable[[dict[str, Any]], Any], key: str) -> None:
    edit_manifest(bundle_copy, change)
    with refused(BundleError, str(bundle_copy), f"['{key}']", "build it again with `"):
        runtime.load(bundle_copy)


def test_strict_builds_what_is_complete(golden_bundle: Path) -> None:
    raw = read_manifest(golden_bundle).model
    assert strict(ModelConfig, raw, "here").to_json() == raw


# Paths


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "onnx/../../secret", "a/../../copy/../secret"])
def test_paths_that_leave_the_bundle(bundle_copy: Path, name: str) -> None:
    (bundle_copy.parent / "secret").write_bytes(b"")

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"]["config.json"]

    edit_manifest(bundle_copy, change)
    with refused(BundleError, repr(name), "leaves the bundle", AGAIN):
        runtime.load(bundle_copy)


def test_files_that_are_links(text_bundle: Path, bundle_copy: Path) -> None:
    """As in a hub's cache, where all files lie in one folder under their hashes; their content is checked as ever."""
    blobs = bundle_copy.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in bundle_copy.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    ids = np.arange(40)[None]
    for backend in ("onnxruntime", "eager"):
        with (
            runtime.load(text_bundle, backend, threads=1) as model,
            runtime.load(bundle_copy, backend, threads=1) as linked,
        ):
            assert np.array_equal(model.logits(ids), linked.logits(ids))
    config = (bundle_copy / "config.json").resolve()
    config.write_bytes(config.read_bytes() + b" ")
    with refused(BundleError, "config.json", "SHA-256", AGAIN):
        runtime.load(bundle_copy)
    config.unlink()
    with refused(BundleError, "config.json is missing", AGAIN):
        runtime.load(bundle_copy)


def test_paths_that_stay(tmp_path: Path) -> None:
    assert inside(tmp_path, "onnx/layer_00.onnx") == tmp_path / "onnx" / "layer_00.onnx"
    assert inside(tmp_path, "config.json", "next") == tmp_path / "next" / "config.json"


# Engines


@pytest.mark.slow
def test_engines_built_for_another_back_end(text_checkpoint: Path, tmp_path: Path) -> None:
    bundle = export.build(text_checkpoint, tmp_path / "b", backends=[])
    assert Bundle.open(bundle).manifest.engines == {}
    with refused(BundleError, "no engines for onnxruntime; to add them, build it again", "--backend onnxruntime"):
        runtime.load(bundle, "onnxruntime")
    with runtime.load(bundle, "eager", threads=1) as model:  # needs no engine
        assert model.backend == "eager"
    with runtime.load(bundle, threads=1) as model:
        assert model.backend == "eager"
    other = json.loads((bundle / MANIFEST).read_text())["parts"]

    def change(manifest: dict[str, Any]) -> None:
        manifest["engines"]["abacus"] = {"precision": "fp32", "profiles": {}, "parts": other}

    edit_manifest(bundle, change)
    with refused(BundleError, "no engines for onnxruntime, only for abacus", "--backend onnxruntime"):
        runtime.load(bundle, "onnxruntime")


@pytest.mark.parametrize("part", ["embed", "layer_01", "head", "drift_row", "probe"])
def test_an_engine_missing_from_the_manifest(bundle_copy: Path, part: str) -> None:
    edit_manifest(bundle_copy, lambda m: m["engines"]["onnxruntime"]["parts"].pop(part))
    with refused(BundleError, f"no engine of {part} for onnxruntime", AGAIN):
        runtime.load(bundle_copy, "onnxruntime")


def test_an_engine_that_the_manifest_does_not_list(bundle_copy: Path) -> None:
    edit_manifest(bundle_copy, lambda m: m["files"].pop("onnx/layer_01.cpu.onnx"))
    with refused(BundleError, "lists no file 'onnx/layer_01.cpu.onnx'", AGAIN):
        runtime.load(bundle_copy, "onnxruntime")


def test_an_engine_that_the_back_end_does_not_read(bundle_copy: Path) -> None:
    """A file that is as the manifest has it, and still no graph."""
    import hashlib

    from engines.errors import BackendError

    content = b"not a graph"
    (bundle_copy / "onnx" / "layer_01.cpu.onnx").write_bytes(content)
    entry = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(bundle_copy, lambda m: m["files"].update({"onnx/layer_01.cpu.onnx": entry}))
    with refused(BackendError, "ONNX Runtime failed on layer_01", "python -m export verify"):
        runtime.load(bundle_copy, "onnxruntime")


def test_a_copy_gives_the_same_logits(text_bundle: Path, bundle_copy: Path) -> None:
    """A bundle can be moved: nothing in it names its place."""
    moved = bundle_copy.rename(bundle_copy.parent / "elsewhere")
    ids = np.arange(40)[None]
    with runtime.load(text_bundle, "onnxruntime") as here, runtime.load(moved, "onnxruntime") as there:
        assert np.array_equal(here.logits(ids), there.logits(ids))
    assert signed(dict(vars(Bundle.open(moved).manifest))) == (text_bundle / MANIFEST).read_bytes()
