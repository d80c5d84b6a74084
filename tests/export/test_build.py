"""Building: options, what lies in the way, a full disk, two at once, and a build that is killed anywhere."""

import builtins
import errno
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file

import export
import export.checkpoint
import runtime
from engines.bundle import CALIBRATION, MANIFEST, STAMPS, VERSION, Bundle, set_defaults
from engines.errors import BackendError, BundleError, CheckpointError, NewerBundleError, OptionError
from engines.weights import NAMES, locate
from export.build import estimate, plan
from export.checkpoint.reader import open_checkpoint
from export.folder import LOCK, locked, others
from export.graphs.quantize import INT8
from export.part import sources_digest
from scripts.experiments.make_random_checkpoint import SHAPES, make_checkpoint
from tests.support.cases import DRIFT_PARTS, GOLDEN, edit_manifest, refused, sentence

KILLS = int(os.environ.get("KILL_BUILDS", "4"))
IDS = np.random.default_rng(0).integers(0, 60, (2, 40))


def logits(bundle: Path) -> np.ndarray:
    with runtime.load(bundle, "onnxruntime") as model:
        return model.logits(IDS)


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def ages(folder: Path) -> dict[str, int]:
    """When each file was last written; the lock is opened by every build."""
    return {p.name: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != LOCK}


@pytest.fixture(scope="module")
def undisturbed(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Logits of the tiny checkpoint, of a build that nothing interrupted."""
    return logits(export.build(tiny_checkpoint, tmp_path_factory.mktemp("undisturbed") / "bundle"))


# What a build makes


def test_same_input_same_bytes(text_checkpoint: Path, text_bundle: Path, tmp_path: Path) -> None:
    again = export.build(str(text_checkpoint), str(tmp_path / "deep" / "down"))
    assert again == tmp_path / "deep" / "down"
    assert content(again) == content(text_bundle)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_precision(tiny_checkpoint: Path, tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    """The graphs hold rounded weights; those for the CPU the same numbers in fp32, and the embedding as it is."""
    bundle = Bundle.open(export.build(tiny_checkpoint, tmp_path / "b", precision=precision))
    stored = open_checkpoint(tiny_checkpoint)
    for part in bundle.config.parts:
        for name, tensor in load_file(bundle.weights(part)).items():
            assert torch.equal(tensor, stored.part(part)[name].to(dtype).contiguous()), (part, name)
        built = bundle.file(bundle.engines("onnxruntime")["parts"][part]["weights"])
        for name, tensor in load_file(built).items():
            assert torch.equal(tensor.float(), stored.part(part)[name].to(dtype).float().contiguous()), (part, name)
        assert {e.dtype for e in locate(built).values()} == {precision if part == "embed" else "fp32"}
    assert bundle.manifest.precision == precision
    assert logits(bundle.root).shape == (2, 40, 64)


def test_fp16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "c", SHAPES["tiny"])
    from safetensors.torch import save_file

    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["model.transformer.blocks.1.q_proj.weight"][0, 0] = 1e6
    save_file(tensors, shard)
    with refused(CheckpointError, "layer_01", "q_proj.weight", "fp16", "--bf16"):
        export.build(folder, tmp_path / "b", precision="fp16")
    assert not (tmp_path / "b" / MANIFEST).exists()
    assert logits(export.build(folder, tmp_path / "b", precision="bf16")).shape == (2, 40, 64)


def test_no_back_end_is_no_back_end(tiny_checkpoint: Path, tmp_path: Path) -> None:
    bundle = export.build(tiny_checkpoint, tmp_path / "b", backends=[])
    assert Bundle.open(bundle).manifest.engines == {}


def test_progress_names_each_part(tiny_checkpoint: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    export.build(tiny_checkpoint, tmp_path / "b", progress=lambda *event: seen.append(event))
    names = ("embed", "layer_00", "layer_01", "head", *DRIFT_PARTS, "probe")
    on_the_cpu = ("embed", "layer_00", "layer_01", "head", "attention", *DRIFT_PARTS, "probe", "reuse")
    exported = [(f"onnx/{name}", i, 7) for i, name in enumerate(names, 1)]
    assert seen == exported + [(f"onnx/{name}", i, 9) for i, name in enumerate(on_the_cpu, 1)]


def test_the_estimate_is_near(golden_bundle: Path) -> None:
    job = plan(GOLDEN, None, "fp32", None, None, 32, 4, 1)
    size = sum(path.stat().st_size for path in golden_bundle.glob("onnx/*.safetensors"))
    assert abs(estimate(job)["disk"] / size - 1) < 0.02


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [({"precision": "int8"}, ("precision", "fp32", "int8")),
     ({"backends": ["abacus"]}, ("abacus", "choose", "onnxruntime")),
     ({"max_length": 257}, ("max_length", "1 … 256", "257")), ({"max_length": 0}, ("max_length", "1 … 256", "0")),
     ({"window": 0}, ("window", "1 … 256", "0")), ({"window": 65, "max_length": 64}, ("window", "1 … 64", "65")),
     ({"track_num": 0}, ("track_num", "1 …", "0")), ({"max_batch": 0}, ("max_batch", "1 …", "0"))],
)  # fmt: skip
def test_options_out_of_range(tiny_checkpoint: Path, tmp_path: Path, options: dict[str, Any], words: Any) -> None:
    with refused(OptionError, *words):
        export.build(tiny_checkpoint, tmp_path / "b", **options)
    assert not (tmp_path / "b").exists(), "nothing was written"


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


# What lies in the way


def test_up_to_date(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = export.build(tiny_checkpoint, tmp_path / "b")
    before = ages(bundle)
    monkeypatch.setattr(sys.modules["export.build"], "run", lambda job: pytest.fail("built again"))
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: pytest.fail("removed a file"))
    began = time.perf_counter()
    assert export.build(tiny_checkpoint, bundle) == bundle
    assert time.perf_counter() - began < 1
    assert ages(bundle) == before


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
    with refused(BundleError, str(out), name, "--out", "--force"):
        export.build(tiny_checkpoint, out)
    assert content(out) == {name: b"mine"}


def test_a_newer_bundle_needs_force(text_checkpoint: Path, bundle_copy: Path) -> None:
    edit_manifest(bundle_copy, lambda m: m.update(version=VERSION + 1))
    before = content(bundle_copy)
    with refused(NewerBundleError, str(bundle_copy), f"version {VERSION + 1}", "update"):
        export.build(text_checkpoint, bundle_copy)
    assert content(bundle_copy) == before
    export.build(text_checkpoint, bundle_copy, force=True)
    Bundle.open(bundle_copy).check()


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


def test_a_damaged_stamp_is_not_believed(text_checkpoint: Path, text_bundle: Path, bundle_copy: Path) -> None:
    """Many a byte of a stamp changed, in an unfinished build: the next one gives what an undisturbed one gives."""
    stamp = bundle_copy / STAMPS / "onnx-layer_01.onnx.json"
    raw = stamp.read_bytes()
    for at in range(0, len(raw), 17):
        (bundle_copy / MANIFEST).unlink()
        stamp.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        export.build(text_checkpoint, bundle_copy)
        assert content(bundle_copy) == content(text_bundle), at
    for other in (b"", b"[]", b"1", b'{"key": 1}'):
        (bundle_copy / MANIFEST).unlink()
        stamp.write_bytes(other)
        export.build(text_checkpoint, bundle_copy)
        assert content(bundle_copy) == content(text_bundle), other


def test_finished_parts_are_taken_up(text_checkpoint: Path, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an unfinished build only the graph that is not there is made."""
    (bundle_copy / MANIFEST).unlink()
    (bundle_copy / "onnx" / "layer_01.onnx").unlink()
    made: list[str] = []
    from export.graphs import writers

    real = writers.build

    def noted(signature: Any, *rest: Any) -> Any:
        made.append(signature.name)
        return real(signature, *rest)

    monkeypatch.setattr(writers, "build", noted)
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
        patch.setattr("engines.weights.write", full)
        with refused(BundleError, str(bundle), "No space left on device", "--out"):
            export.build(tiny_checkpoint, bundle, "fp16")
    assert content(bundle) == before
    Bundle.open(bundle).check()
    export.build(tiny_checkpoint, bundle, "fp16")
    whole = export.build(tiny_checkpoint, tmp_path / "whole", "fp16")
    assert content(bundle) == content(whole)
    export.build(tiny_checkpoint, bundle, "fp16", backends=[])  # asks for less: stays as it is
    assert content(bundle) == content(whole)


def test_generation_defaults_become_the_bundles(text_checkpoint: Path, tmp_path: Path) -> None:
    """Changed defaults are taken up by the next build, which makes no part anew."""
    checkpoint = Path(shutil.copytree(text_checkpoint, tmp_path / "c"))
    bundle = export.build(checkpoint, tmp_path / "b", window=16)
    before = Bundle.open(bundle).manifest
    (checkpoint / "generation_config.json").write_text('{"elastic": {"threshold": 0.7, "window": 32, "max_masks": 64}}')
    after = Bundle.open(export.build(checkpoint, bundle, window=16)).manifest
    assert before.defaults["threshold"] == 0.9 and "max_masks" not in before.defaults
    assert after.defaults == before.defaults | {"threshold": 0.7, "max_masks": 64, "window": 16}, "within the capacity"
    assert after.parts == before.parts
    assert Bundle.open(export.build(checkpoint, tmp_path / "wide")).capacity.window == 32, "room for its own window"


# A bundle that is built upon


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
        job = plan(tiny_checkpoint, tmp_path / "b", "fp32", [], None, None, 1, 1)
        return others(replace(job, backends=["any"], **options), manifest)

    assert other() == other(flavour="one") == other(flavour="one", capabilities=["8.9"]) == []
    assert other(flavour="other") == ["any flavour one"]
    assert other(capabilities=["9.0"], precision="fp16") == ["precision fp32", "any capabilities ['8.9']"]


def test_no_stamp_outlives_the_names_of_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(str(export.checkpoint.__file__)).parent
    shutil.copytree(folder, tmp_path / "models")
    before = sources_digest.__wrapped__()
    monkeypatch.setattr(export.checkpoint, "__file__", str(tmp_path / "models/__init__.py"))
    assert sources_digest.__wrapped__() == before
    family = tmp_path / "models/families/llada.py"
    family.write_text(family.read_text().replace("ff_proj", "up_proj"))
    assert sources_digest.__wrapped__() != before


# Weights in few bits


@pytest.mark.parametrize(("weights", "cosine"), [("int8", 0.999), ("int4", 0.9)])
def test_quantised_weights(tiny_checkpoint: Path, tmp_path: Path, weights: str, cosine: float) -> None:
    """Smaller files, logits nearly as they were, a build that is taken up, and no other build in their place."""
    whole = Bundle.open(export.build(tiny_checkpoint, tmp_path / "whole"))
    bundle = Bundle.open(export.build(tiny_checkpoint, tmp_path / "b", weights=weights))
    entry = bundle.engines("onnxruntime")
    data = entry["parts"]["layer_01"]["weights"]
    before = whole.manifest.files[whole.engines("onnxruntime")["parts"]["layer_01"]["weights"]]["size"]
    assert entry["weights"] == weights and data.endswith(f"layer_01.{weights}.data")
    assert bundle.manifest.files[data]["size"] < before / (2 if weights == "int8" else 3)
    nodes = onnx.load(str(bundle.graph("layer_01", "onnxruntime")), load_external_data=False).graph.node
    levels = [
        a.i for node in nodes if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "accuracy_level"
    ]
    assert levels == [INT8] * 7, "else the processor multiplies in fp32, and takes longer than with whole weights"
    got, expected = logits(bundle.root), logits(whole.root)
    near = float((got * expected).sum() / np.linalg.norm(got) / np.linalg.norm(expected))
    print(f"{weights}: max {np.abs(got - expected).max():.2e} cosine {near:.6f}")
    assert cosine < near < 1
    assert not list(bundle.root.rglob("*.whole.*")), "what the quantizer read is gone"
    (bundle.root / MANIFEST).unlink()
    assert content(export.build(tiny_checkpoint, bundle.root, weights=weights)) == content(bundle.root)
    with refused(BundleError, f"with other options (onnxruntime weights {weights})", "--force"):
        export.build(tiny_checkpoint, bundle.root)


def test_quantised_weights_are_onnxruntimes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with refused(OptionError, "int8, int4", "int2"):
        export.build(tiny_checkpoint, tmp_path / "b", weights="int2")
    with refused(OptionError, "--weights is ONNX Runtime's", "--backend onnxruntime"):
        export.build(tiny_checkpoint, tmp_path / "b", weights="int4", backends=[])


# Two builds at once


def test_one_build_at_a_time(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    out.mkdir()
    with locked(out), refused(BundleError, "another build", str(out), "wait"):
        export.build(tiny_checkpoint, out)
    assert list(out.iterdir()) == [out / LOCK]
    Bundle.open(export.build(tiny_checkpoint, out)).check()


def test_builds_racing(tiny_checkpoint: Path, tmp_path: Path, undisturbed: np.ndarray) -> None:
    """Each of three processes builds or is told to wait; the bundle is whole."""
    out = tmp_path / "b"
    racers = [forked(tiny_checkpoint, out) for _ in range(3)]
    for racer in racers:
        racer.join(240)
    assert {racer.exitcode for racer in racers} <= {0, 7} and 0 in {racer.exitcode for racer in racers}
    assert np.array_equal(logits(out), undisturbed)


def forked(checkpoint: Path, out: Path, **options: Any) -> Any:
    """A process that builds: a copy of this one, so that it begins to write at once."""

    def work() -> None:
        try:
            export.build(checkpoint, out, **options)
        except BundleError as error:
            sentence(str(error), "another build", "wait")
            os._exit(7)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=work)  # type: ignore[attr-defined, unused-ignore]
    process.start()
    return process


# A disk that is full or cannot be written


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


class FullDisk:
    """Lets `left` files be written; the next one is cut in the middle, and so is every later one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
        self.left, self.real = left, io.open
        for module in (builtins, io):
            monkeypatch.setattr(module, "open", self.open)

    def open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        opened = self.real(file, mode, *args, **kwargs)
        if not set(mode) & set("wax+") or Path(str(file)).name == LOCK:
            return opened
        self.left -= 1
        return opened if self.left >= 0 else Full(opened)


class Full:
    """A file whose first write is cut, as a full disk cuts it."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: Any) -> int:
        self.file.write(bytes(data)[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        if name == "fileno":  # so that a copy goes through `write`
            raise AttributeError(name)
        return getattr(self.file, name)


@contextmanager
def full_after(left: int) -> Iterator[FullDisk]:
    with pytest.MonkeyPatch.context() as patch:
        yield FullDisk(patch, left)


@pytest.mark.parametrize(
    ("precision", "files", "step"), [("fp32", 2 * (4 + 13) + 2, 5), ("fp16", 2 * (14 + 9) + 2, 11)]
)
def test_a_disk_that_is_full_at_any_file(
    tiny_checkpoint: Path, tmp_path: Path, precision: str, files: int, step: int
) -> None:
    """Whichever file does not fit: one sentence, nothing loads, and with room the same build completes.

    Weights, graphs and stamps of the parts, config.json and the manifest.
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
        with refused(BundleError, "not finished", "python -m export build"):
            runtime.load(out)
        export.build(tiny_checkpoint, out, precision)
        assert {n: c for n, c in content(out).items() if not n.endswith(".tmp")} == whole
        shutil.rmtree(out)
    assert left - step < files <= left, "all of the build was tried"


def test_a_disk_that_is_full_while_replacing(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The old bundle, half overwritten, does not load as either of the two."""
    new = content(export.build(tiny_checkpoint, tmp_path / "new", window=8, force=True))
    for left in range(0, 21, 3):
        out = export.build(tiny_checkpoint, tmp_path / f"b{left}", "fp16")
        with full_after(left), refused(BundleError, "No space left on device"):
            export.build(tiny_checkpoint, out, window=8, force=True)
            pytest.fail(f"{left} files were enough")
        with refused(BundleError, "not finished"):
            runtime.load(out)
        export.build(tiny_checkpoint, out, window=8, force=True)
        assert {n: c for n, c in content(out).items() if not n.endswith(".tmp")} == new


# Kills


def test_killed_builds(tiny_checkpoint: Path, tmp_path: Path, undisturbed: np.ndarray) -> None:
    """SIGKILL anywhere: what is there does not load, or is whole; the same build again completes.

    Every other build replaces a bundle of the same checkpoint with other
    options. KILL_BUILDS sets how many are killed.
    """
    took: dict[bool, float] = {}
    for replacing in (False, True):
        out = prepared(tiny_checkpoint, tmp_path / f"timed-{replacing}", replacing)
        began = time.perf_counter()
        process = forked(tiny_checkpoint, out, force=replacing)
        process.join(240)
        assert process.exitcode == 0
        took[replacing] = time.perf_counter() - began
    rng = random.Random(20251014)
    killed, unfinished = 0, 0
    for number in range(KILLS):
        replacing = number % 2 == 1
        out = prepared(tiny_checkpoint, tmp_path / f"b{number}", replacing)
        moment = (number + rng.random()) / KILLS * took[replacing]
        process = forked(tiny_checkpoint, out, force=replacing)
        time.sleep(moment)
        process.kill()
        process.join(240)
        killed += process.exitcode == -signal.SIGKILL
        loads = whole(out, undisturbed, replacing)
        unfinished += not loads
        export.build(tiny_checkpoint, out, force=replacing)
        assert np.array_equal(logits(out), undisturbed), f"build {number}, killed after {moment:.3f} s"
        assert whole(out, undisturbed, False)
    print(f"{KILLS} builds: {killed} killed, {unfinished} left unfinished; undisturbed {took}")
    assert killed >= max(1, KILLS // 4), "the kills came too late to mean anything"


def prepared(checkpoint: Path, out: Path, replacing: bool) -> Path:
    return export.build(checkpoint, out, "bf16", window=4) if replacing else out


def whole(out: Path, undisturbed: np.ndarray, replacing: bool) -> bool:
    """Whether the folder loads: if so, every file is checked, and the logits are those of one of the two bundles."""
    try:
        bundle = Bundle.open(out)
        bundle.check()
    except BundleError as error:
        sentence(str(error), str(out), "python -m export build")
        return False
    if replacing and bundle.manifest.precision == "bf16":  # the old bundle, not yet touched
        assert bundle.capacity.window == 4 and np.abs(logits(out) - undisturbed).max() > 0
        return True
    assert bundle.manifest.precision == "fp32" and np.array_equal(logits(out), undisturbed)
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


def test_codes_of_weights() -> None:
    assert sorted(NAMES) == ["BF16", "F16", "F32"]


def test_tools_are_recorded(golden_bundle: Path) -> None:
    tools = json.loads((golden_bundle / MANIFEST).read_text())["tools"]
    assert {"python", "torch", "onnx", "onnxruntime", "numpy"} <= set(tools) and all(tools.values())
