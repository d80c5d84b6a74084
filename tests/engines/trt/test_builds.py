"""Builds for TensorRT: what is refused, and real ones with tensorrt-rtx, ahead of time on a machine without a GPU."""

import json
import shutil
from pathlib import Path

import pytest

import export
import tests.support.fake_gpu as fake
from engines.bundle import Bundle
from engines.errors import BackendError, BundleError, OptionError
from scripts.experiments.make_random_checkpoint import SHAPES, make_checkpoint
from tests.support.cases import GOLDEN, refused
from tests.support.fake_gpu import fake_gpu


def test_options_of_a_build(tmp_path: Path) -> None:
    with fake_gpu(fp32=False):
        with refused(OptionError, "no fused attention in fp32", "--fp16 or --bf16"):
            export.build(GOLDEN, tmp_path / "b", backends=["tensorrt"])
        with refused(OptionError, "no compute capability '9.9'", "8.0, 8.6, 8.9, 12.0, current"):
            export.build(GOLDEN, tmp_path / "b", precision="fp16", backends=["tensorrt"], capabilities=["9.9"])
        for given_ in ({"flavour": "tensorrt"}, {"capabilities": ["8.9"]}):
            with refused(OptionError, "--flavour and --capability are TensorRT's"):
                export.build(GOLDEN, tmp_path / "b", **given_)  # type: ignore[arg-type]
    assert not (tmp_path / "b").exists()


def test_attention_that_fell_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fake.NATIVE, "Attention", "MATRIX_MULTIPLY")
    with fake_gpu(), refused(BackendError, "took ATTENTION_INPUT of layer_00", "apart", "--backend onnxruntime"):
        export.build(GOLDEN, tmp_path / "b", backends=["tensorrt"])
    with refused(BundleError, "not finished"):
        Bundle.open(tmp_path / "b")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32: TensorRT has no attention for smaller ones than 16."""
    shape = SHAPES["tiny"] | {"d_model": 64, "n_heads": 2, "n_kv_heads": 1}
    return make_checkpoint(tmp_path_factory.mktemp("wide") / "wide", shape)


@pytest.fixture(scope="module")
def rtx_bundle(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="real builds need tensorrt-rtx; scripts/setup.sh installs it")
    out = tmp_path_factory.mktemp("rtx") / "bundle"
    return build_rtx(wide, out, "8.9")


def build_rtx(checkpoint: Path, out: Path, *capabilities: str, precision: str = "fp16") -> Path:
    return export.build(
        checkpoint, out, precision=precision, backends=["tensorrt"], max_length=32, window=4,
        flavour="tensorrt_rtx", capabilities=list(capabilities),
    )  # fmt: skip


def test_one_engine_for_every_part(rtx_bundle: Path) -> None:
    bundle = Bundle.open(rtx_bundle)
    bundle.check()
    entry = bundle.engines("tensorrt")
    assert entry["flavour"] == "tensorrt_rtx" and entry["capabilities"] == ["8.9"] and entry["precision"] == "fp16"
    assert set(entry["parts"]) == set(bundle.manifest.parts)
    for part in ("layer_00", "layer_01"):
        native = {"ROTARY_EMBEDDING": 2, "KV_CACHE_UPDATE": 2, "ATTENTION_INPUT": 1}
        assert native.items() <= entry["parts"][part]["layers"].items()
    plans = {part: entry["parts"][part]["plans"] for part in entry["parts"]}
    assert plans["layer_00"] == plans["layer_01"] != plans["head"]
    assert entry["parts"]["layer_00"]["weights"] != entry["parts"]["layer_01"]["weights"]
    assert entry["slots"] == [32 + bundle.capacity.rows]


def test_plans_are_made_once_and_never_stale(rtx_bundle: Path, wide: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(rtx_bundle, copy)
    (copy / "manifest.json").unlink()
    plan = next((copy / "engines/tensorrt").glob("layer_00*.plan"))
    before = plan.stat().st_mtime_ns
    assert build_rtx(wide, copy, "8.9") == copy and plan.stat().st_mtime_ns == before
    (copy / "manifest.json").unlink()
    build_rtx(wide, copy, "8.0")
    assert plan.stat().st_mtime_ns != before
    assert Bundle.open(copy).engines("tensorrt")["capabilities"] == ["8.0"]
    after, content = plan.stat().st_mtime_ns, plan.read_bytes()
    plan.write_bytes(content[:-1])
    (copy / "manifest.json").unlink()
    build_rtx(wide, copy, "8.0")
    assert plan.stat().st_mtime_ns != after and len(plan.read_bytes()) == len(content)


def test_bf16(wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="real builds need tensorrt-rtx; scripts/setup.sh installs it")
    bundle = Bundle.open(build_rtx(wide, tmp_path / "b", "8.9", precision="bf16"))
    assert "KV_CACHE_UPDATE" in bundle.engines("tensorrt")["parts"]["layer_01"]["layers"]


def test_heads_without_a_kernel(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="real builds need tensorrt-rtx; scripts/setup.sh installs it")
    with refused(BackendError, "cannot build layer_00", "not supported by a dedicated kernel", "--backend onnxruntime"):
        build_rtx(tiny_checkpoint, tmp_path / "b", "8.9")


def test_inspect_shows_the_engines(rtx_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from export.cli import main

    assert main(["inspect", str(rtx_bundle)]) == 0
    shown = capsys.readouterr().out
    for text in ("tensorrt_rtx", "compute capability 8.9", "KV_CACHE_UPDATE", "ATTENTION_INPUT", "profiles", "MB"):
        assert text in shown, text
    assert main(["inspect", str(rtx_bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engines"]["tensorrt"]["slots"]
