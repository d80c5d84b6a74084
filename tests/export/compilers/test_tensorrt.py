"""TensorRT engines: what is refused, and real builds with tensorrt-rtx, ahead of time on a machine without a GPU."""

import json
import shutil
import sys
from pathlib import Path

import onnx
import pytest

import export
import tests.support.fake_gpu as fake
from engines.bundle import Bundle
from engines.config import Capacity
from engines.errors import BackendError, BundleError, OptionError
from engines.signatures import GraphSignature
from engines.trt.package import TensorRTPackage, find
from export.compilers import tensorrt
from export.compilers.tensorrt_engine import build_engine, polygraphy_for
from scripts.experiments.make_random_checkpoint import SHAPES, make_checkpoint
from tests.support.cases import GOLDEN, refused
from tests.support.fake_gpu import fake_gpu


@pytest.fixture(scope="module")
def rtx() -> TensorRTPackage:
    pytest.importorskip("tensorrt_rtx", reason="real builds need tensorrt-rtx; scripts/setup.sh installs it")
    return find("tensorrt_rtx")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32: TensorRT has no attention for smaller ones than 16."""
    shape = SHAPES["tiny"] | {"d_model": 64, "n_heads": 2, "n_kv_heads": 1}
    return make_checkpoint(tmp_path_factory.mktemp("wide") / "wide", shape)


@pytest.fixture(scope="module")
def rtx_bundle(rtx: TensorRTPackage, wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built for compute capability 8.9. Read only."""
    return build_rtx(wide, tmp_path_factory.mktemp("rtx") / "bundle", "8.9")


def build_rtx(checkpoint: Path, out: Path, *capabilities: str, precision: str = "fp16") -> Path:
    return export.build(
        checkpoint, out, precision=precision, backends=["tensorrt"], max_length=32, window=4,
        flavour="tensorrt_rtx", capabilities=list(capabilities),
    )  # fmt: skip


def part(bundle: Path, name: str) -> onnx.ModelProto:
    """The graph of a part as it is compiled, for 64 slots."""
    return tensorrt.with_weights_as_inputs(bundle / "onnx" / f"{name}.onnx", 64)


# Plans


def test_lengths() -> None:
    """An engine for 512, 1024, … positions below the bundle's length, and one for that length."""

    def slots(max_length: int) -> list[int]:
        return tensorrt.lengths(Capacity(max_length=max_length, window=4, track_num=1, rows=16, max_batch=1))

    assert slots(32) == [48]
    assert slots(512) == [528]
    assert slots(1100) == [528, 1040, 1120]


def test_profiles() -> None:
    """Only a reuse pass runs several sequences; the rows of a reuse and of a full pass are fixed."""
    capacity = Capacity(max_length=100, window=4, track_num=1, rows=16, max_batch=8)
    reuse, full, general = tensorrt.profiles(GraphSignature("layer_00", (), ()), capacity, 116)
    assert reuse == {"B": (1, 1, 8), "A": (16, 16, 16)}
    assert full == {"B": (1, 1, 1), "A": (116, 116, 116)}
    assert general == {"B": (1, 1, 1), "A": (1, 16, 116)}


@pytest.mark.slow
def test_one_engine_for_every_part(rtx_bundle: Path) -> None:
    bundle = Bundle.open(rtx_bundle)
    bundle.check()
    entry = bundle.engines("tensorrt")
    assert entry["flavour"] == "tensorrt_rtx" and entry["capabilities"] == ["8.9"] and entry["precision"] == "fp16"
    assert set(entry["parts"]) == set(bundle.manifest.parts)
    for name in ("layer_00", "layer_01"):
        native = {"ROTARY_EMBEDDING": 2, "KV_CACHE_UPDATE": 2, "ATTENTION_INPUT": 1}
        assert native.items() <= entry["parts"][name]["layers"].items()
    plans = {name: entry["parts"][name]["plans"] for name in entry["parts"]}
    assert plans["layer_00"] == plans["layer_01"] != plans["head"]
    assert entry["parts"]["layer_00"]["weights"] != entry["parts"]["layer_01"]["weights"]
    assert entry["slots"] == tensorrt.lengths(bundle.capacity)


@pytest.mark.slow
def test_plans_are_made_once_and_never_stale(rtx_bundle: Path, wide: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(rtx_bundle, copy)
    (copy / "manifest.json").unlink()
    plan = next((copy / "engines/tensorrt").glob("layer_00*.plan"))
    before = plan.stat().st_mtime_ns
    assert build_rtx(wide, copy, "8.9") == copy and plan.stat().st_mtime_ns == before
    (copy / "manifest.json").unlink()
    build_rtx(wide, copy, "8.0", "8.9")
    assert plan.stat().st_mtime_ns != before
    assert Bundle.open(copy).engines("tensorrt")["capabilities"] == ["8.0", "8.9"]
    after, content = plan.stat().st_mtime_ns, plan.read_bytes()
    plan.write_bytes(content[:-1])
    (copy / "manifest.json").unlink()
    build_rtx(wide, copy, "8.0", "8.9")
    assert plan.stat().st_mtime_ns != after and len(plan.read_bytes()) == len(content)


def test_several_capabilities_and_profiles_are_in_the_plan(rtx: TensorRTPackage, rtx_bundle: Path) -> None:
    """A plan for two compute capabilities is another than for one; one with two profiles is larger."""
    model, one, full = part(rtx_bundle, "embed"), {"B": (1, 1, 1), "A": (1, 8, 64)}, {"B": (1, 1, 1), "A": (64, 64, 64)}
    variants = ([one], ["8.9"]), ([one], ["8.0", "8.9"]), ([one, full], ["8.9"])
    plans = [build_engine(rtx, "embed", model, *variant)[0] for variant in variants]
    assert len(set(plans)) == 3 and len(plans[0]) < len(plans[2])


@pytest.mark.slow
def test_bf16(rtx: TensorRTPackage, wide: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(build_rtx(wide, tmp_path / "b", "8.9", precision="bf16"))
    assert "KV_CACHE_UPDATE" in bundle.engines("tensorrt")["parts"]["layer_01"]["layers"]


def test_inspect_shows_the_engines(rtx_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from export.cli import main

    assert main(["inspect", str(rtx_bundle)]) == 0
    shown = capsys.readouterr().out
    for text in ("tensorrt_rtx", "compute capability 8.9", "KV_CACHE_UPDATE", "ATTENTION_INPUT", "profiles", "MB"):
        assert text in shown, text
    assert main(["inspect", str(rtx_bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["engines"]["tensorrt"]["slots"]


# What is refused


def test_options_of_a_build(tmp_path: Path) -> None:
    with fake_gpu(fp32=False):
        with refused(OptionError, "no fused attention in fp32", "--fp16 or --bf16"):
            export.build(GOLDEN, tmp_path / "b", backends=["tensorrt"])
        with refused(OptionError, "no compute capability '9.9'", "8.0, 8.6, 8.9, 12.0, current"):
            export.build(GOLDEN, tmp_path / "b", precision="fp16", backends=["tensorrt"], capabilities=["9.9"])
        with refused(OptionError, "compiles for current alone", "leave --capability"):
            export.build(GOLDEN, tmp_path / "b", "fp16", backends=["tensorrt"], capabilities=["8.9", "current"])
        for name, value in (("flavour", "tensorrt"), ("capabilities", ["8.9"])):
            with refused(OptionError, "an option of back end tensorrt", "add --backend tensorrt"):
                export.build(GOLDEN, tmp_path / "b", **{name: value})  # type: ignore[arg-type]
    assert not (tmp_path / "b").exists()


def test_a_package_for_the_gpu_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without names for compute capabilities, none may be given."""
    with fake_gpu():
        package = find("tensorrt")
        monkeypatch.delattr(package.module, "ComputeCapability")
        assert tensorrt.targets(package, None) == ["current"]
        with refused(OptionError, "compiles for the GPU of this machine", "leave --capability out"):
            tensorrt.targets(package, ["8.9"])


def test_layers_that_are_not_native(rtx: TensorRTPackage, rtx_bundle: Path) -> None:
    """The drift test writes attention out, as a layer must not."""
    signature = GraphSignature("tests_row", (), ())
    capacity = Capacity(max_length=32, window=4, track_num=1, rows=16, max_batch=1)
    spans = tensorrt.profiles(signature, capacity, 64)
    with refused(BackendError, "no native ATTENTION_INPUT for tests_row", "update TensorRT", "--backend onnxruntime"):
        build_engine(rtx, "tests_row", part(rtx_bundle, "tests_row"), spans, ["8.9"], native=("ATTENTION_INPUT",))


def test_attention_that_is_not_native(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build stops at the first layer, and there is no bundle."""
    monkeypatch.setitem(fake.NATIVE, "Attention", "MATRIX_MULTIPLY")
    with fake_gpu(), refused(BackendError, "no native ATTENTION_INPUT for layer_00", "--backend onnxruntime"):
        export.build(GOLDEN, tmp_path / "b", backends=["tensorrt"])
    with refused(BundleError, "not finished"):
        Bundle.open(tmp_path / "b")


def test_heads_without_a_kernel(
    rtx: TensorRTPackage, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorRT's own message is the reason, and Python prints nothing."""
    with refused(BackendError, "cannot build layer_00", "not supported by a dedicated kernel", "--backend onnxruntime"):
        build_rtx(tiny_checkpoint, tmp_path / "b", "8.9")
    assert capsys.readouterr() == ("", "")


def test_a_graph_that_cannot_be_read(rtx: TensorRTPackage, rtx_bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = part(rtx_bundle, "embed")
    model.graph.node[0].op_type = "NoSuchOperator"
    with refused(BackendError, f"tensorrt_rtx {rtx.version} cannot read embed", "NoSuchOperator", "another version"):
        build_engine(rtx, "embed", model, [], ["8.9"])
    assert capfd.readouterr() == ("", "")


def test_polygraphy_is_not_installed(rtx: TensorRTPackage, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "polygraphy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    with refused(BackendError, "built with Polygraphy, which is missing", "pip install 'elastic-diffusion[export]'"):
        polygraphy_for(rtx)


# Polygraphy


def test_each_build_chooses_its_package(rtx: TensorRTPackage, rtx_bundle: Path) -> None:
    """Polygraphy is imported for one TensorRT package; one process builds with both, in any order."""
    model, spans = part(rtx_bundle, "embed"), [{"B": (1, 1, 1), "A": (1, 8, 64)}]

    def with_fake() -> bytes:
        with fake_gpu():
            return build_engine(find("tensorrt"), "embed", model, spans, ["8.9"])[0]

    def with_rtx() -> bytes:
        return build_engine(rtx, "embed", model, spans, ["8.9"])[0]

    first, second, third, fourth = with_fake(), with_rtx(), with_fake(), with_rtx()
    assert first == third and model.SerializeToString() in first
    assert len(second) == len(fourth) and model.SerializeToString() not in second


def test_polygraphys_logger_is_left_as_it_was(rtx: TensorRTPackage, rtx_bundle: Path) -> None:
    logger = polygraphy_for(rtx).logger
    settings = "module_severity", "use_python_logging_system", "letter", "colors"
    before = [getattr(logger, name) for name in settings]
    build_engine(rtx, "embed", part(rtx_bundle, "embed"), [{"B": (1, 1, 1), "A": (1, 8, 64)}], ["8.9"])
    assert [getattr(logger, name) for name in settings] == before
