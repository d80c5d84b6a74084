"""The command line of export: what build, verify and inspect print, and how they fail."""

import json
import shutil
from pathlib import Path

import pytest

import export.cli
from engines.bundle import MANIFEST, Bundle
from engines.defaults import CALIBRATION, set_defaults
from engines.record import NEXT
from scripts.experiments.make_random_checkpoint import SHAPES, make_checkpoint
from tests.support.cases import sentence
from tests.support.commands import Call, failed, interrupted, process


@pytest.fixture
def build(call: Call) -> Call:
    return lambda *argv: call(export.cli.main, "build", *argv)


@pytest.mark.slow
def test_interrupted_while_building(tmp_path: Path) -> None:
    """Nothing loads, and the same command goes on where it stopped."""
    checkpoint = make_checkpoint(tmp_path / "deep", SHAPES["tiny"] | {"n_layers": 80})
    argv = ("export", "build", "--checkpoint", checkpoint, "--out", tmp_path / "b")
    child = process(*argv)
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("[2/"):
            break
    interrupted(child, "run the same command again", "where it stopped")
    assert not (tmp_path / "b" / MANIFEST).exists()
    first = tmp_path / "b" / "onnx" / "embed.onnx"
    written = (tmp_path / "b" / NEXT / "onnx" / "embed.onnx").stat().st_mtime_ns
    export.cli.main([str(arg) for arg in argv[1:]])
    Bundle.open(tmp_path / "b").check()
    assert first.stat().st_mtime_ns == written, "the first part was taken up, not made again"


@pytest.mark.slow
def test_build(build: Call, call: Call, text_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    code, printed, err = build("--checkpoint", text_checkpoint, "--out", out, "--fp16", "--window", 8, "--track-num", 2)
    assert (code, err) == (0, "")
    assert "2 layers of width 32" in printed and "fp16" in printed and "GB of disk" in printed
    for part in ("embed", "layer_00", "layer_01", "head", "probe"):
        assert f"onnx/{part}" in printed and f"engines/onnxruntime/{part}" in printed
    assert "onnx/tests_row" in printed and "engines/onnxruntime/drift_row" in printed
    assert f"[ok] {out}" in printed and "up to date" not in printed
    bundle = Bundle.open(out)
    assert (bundle.capacity.window, bundle.capacity.track_num, bundle.manifest.precision) == (8, 2, "fp16")
    again = build("--checkpoint", text_checkpoint, "--out", out, "--fp16", "--window", 8, "--track-num", 2)
    assert again[0] == 0 and f"[ok] {out}" in again[1] and "up to date" in again[1] and "embed" not in again[1]
    failed_late = build("--checkpoint", text_checkpoint, "--out", out, "--window", 8, "--track-num", 2)
    assert failed_late[0] == 1
    sentence(failed_late[2], "with other options", "--out", "--force")
    assert build("--checkpoint", text_checkpoint, "--out", out, "--force")[0] == 0
    assert Bundle.open(out).manifest.precision == "fp32"


@pytest.mark.slow
def test_build_for_no_back_end(build: Call, text_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    assert build("--checkpoint", text_checkpoint, "--out", out, "--fp16", "--backend", "none")[0] == 0
    assert Bundle.open(out).manifest.engines == {} and not (out / "engines").exists()
    assert build("--checkpoint", text_checkpoint, "--out", out, "--fp16", "--backend", "onnxruntime")[0] == 0
    assert "onnxruntime" in Bundle.open(out).manifest.engines


def test_dry_run(build: Call, text_checkpoint: Path, tmp_path: Path) -> None:
    code, printed, err = build("--checkpoint", text_checkpoint, "--out", tmp_path / "b", "--dry-run")
    assert (code, err) == (0, "") and not (tmp_path / "b").exists()
    for word in ("embed", "layer_00", "layer_01", "head", "GB of disk", "GB of memory", str(tmp_path / "b")):
        assert word in printed


@pytest.mark.slow
def test_build_json(build: Call, text_checkpoint: Path, tmp_path: Path) -> None:
    """One line of JSON, and progress on standard error."""
    argv = ("--checkpoint", text_checkpoint, "--out", tmp_path / "b", "--json")
    planned = json.loads(build(*argv, "--dry-run")[1])
    assert planned["parts"][0] == "embed" and planned["backends"] == ["onnxruntime"] and planned["disk_bytes"] > 0
    code, printed, err = build(*argv)
    made = json.loads(printed)
    assert code == 0 and made["bundle"] == str(tmp_path / "b") and not made["up_to_date"] and "[1/" in err
    assert made["files"] == len(Bundle.open(tmp_path / "b").manifest.files) and made["bytes"] > 0
    assert json.loads(build(*argv)[1])["up_to_date"]


@pytest.mark.slow
def test_names_that_look_like_markup(build: Call, call: Call, text_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(text_checkpoint, tmp_path / "[bold]x[" / "[red]"))
    out = tmp_path / "[green]"
    code, printed, _ = build("--checkpoint", checkpoint, "--out", out)
    assert code == 0 and printed.startswith("[red]: llada") and f"[ok] {out}" in printed
    code, printed, _ = call(export.cli.main, "inspect", out)
    assert code == 0 and printed.startswith(f"{out}: [red] (")


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [("--checkpoint nowhere --out OUT", 1, ("nowhere", "not a directory", "config.json")),
     ("--checkpoint CKPT --out OUT --fp16 --bf16", 2, ("not allowed with", "--help")),
     ("--checkpoint CKPT --out OUT --backend x", 2, ("--backend", "invalid choice", "onnxruntime", "--help")),
     ("--checkpoint CKPT --out OUT --backend none --backend onnxruntime", 2, ("none", "choose from", "onnxruntime")),
     ("--checkpoint CKPT --out OUT --max-length 9999", 2, ("max_length", "1 … 256", "9999")),
     ("--checkpoint CKPT --out OUT --window 0", 2, ("window", "1 … 256", "0")),
     ("--checkpoint CKPT --out OUT --track-num x", 2, ("--track-num", "invalid int", "--help")),
     ("--checkpoint CKPT --out CKPT", 2, ("--out", "must not be the checkpoint's own folder"))],
)  # fmt: skip
def test_build_refuses(
    build: Call, text_checkpoint: Path, tmp_path: Path, argv: str, code: int, words: tuple[str, ...]
) -> None:
    given = argv.replace("CKPT", str(text_checkpoint)).replace("OUT", str(tmp_path / "b")).split()
    failed(build(*given), code, *words)
    assert not (tmp_path / "b").exists()


def test_build_into_a_file(build: Call, text_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code, _, err = build("--checkpoint", text_checkpoint, "--out", tmp_path / "file")
    assert code == 1 and (tmp_path / "file").read_text() == "mine"
    sentence(err, "error: ", f"cannot write {tmp_path / 'file'}", "File exists", "--out")


def test_inspect(call: Call, golden_bundle: Path) -> None:
    code, printed, err = call(export.cli.main, "inspect", golden_bundle)
    assert (code, err) == (0, "")
    for word in ("llada-tiny-a", "layer_03", "k_cache", "engines onnxruntime: fp32", "'window': 32", "tests_head"):
        assert word in printed
    code, printed, err = call(export.cli.main, "inspect", golden_bundle, "--json")
    assert (code, err) == (0, "") and json.loads(printed) == dict(vars(Bundle.open(golden_bundle).manifest))
    assert f"defaults of decoding {Bundle.open(golden_bundle).manifest.defaults}" in " ".join(
        call(export.cli.main, "inspect", golden_bundle)[1].split()
    )
    failed(call(export.cli.main, "inspect", golden_bundle / "onnx"), 1, "is no bundle", "a bundle's folder")


def test_inspect_shows_defaults_and_their_evidence(call: Call, bundle_copy: Path) -> None:
    set_defaults(bundle_copy, {"window": 8}, CALIBRATION, {"prompts": 7, "chosen": {"agreement": 0.5}, "trials": [1]})
    _, printed, _ = call(export.cli.main, "inspect", bundle_copy)
    assert "defaults of decoding {'window': 8}" in printed
    assert "measured by calibrate: prompts 7, chosen {'agreement': 0.5} (calibration.json has all trials)" in printed


def test_verify(call: Call, text_bundle: Path) -> None:
    code, printed, err = call(export.cli.main, "verify", text_bundle)
    assert code == 0 and "layer_01" in printed and "[ok] all values close" in printed
    rows = len(Bundle.open(text_bundle).manifest.parts) + 1
    assert err.splitlines()[-1].startswith(f"verify: {rows} of {rows}, ")
    code, lines, err = call(export.cli.main, "verify", text_bundle, "--json", "-q")
    assert (code, err) == (0, "") and [json.loads(line)["part"] for line in lines.splitlines()][-1] == "forward"
    _, lines, err = call(export.cli.main, "verify", text_bundle, "--json", "--backend", "graphs")
    assert err.splitlines()[-1].startswith(f"verify: {lines.count(chr(10))} of {lines.count(chr(10))}, ")
    code, printed, err = call(export.cli.main, "verify", text_bundle, "--atol", "1e-12", "-q")
    assert code == 1 and "[ok]" not in printed
    sentence(err, "differ from eager by more than 1e-12", "the worst is", "build it again")
    failed(call(export.cli.main, "verify", text_bundle, "--atol", 0), 2, "atol must be positive", "0")
    failed(call(export.cli.main, "verify", text_bundle, "--backend", "eager"), 2, "eager is the reference", "another")
