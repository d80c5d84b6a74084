"""The package `tensorrt`, where its documentation asks for other calls than `tensorrt_rtx`; and `tensorrt_lean`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import export
import runtime
from engines.bundle import Bundle
from engines.errors import BackendError, BundleError, DeviceError, OptionError
from export.compilers import tensorrt, tensorrt_engine
from tests.support.cases import GOLDEN, refused
from tests.support.fake_gpu import FakeCuda, fake_gpu
from tests.support.fake_tensorrt import Engine, fake_tensorrt
from tests.support.gpu_models import device

VERSION, NEXT = "10.15.1.29", "11.1.0.106"
PROMPT = list(range(5, 25))
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A function that builds the golden checkpoint by a version of tensorrt with `compatible`, once for each."""
    made: dict[str, Path] = {}

    def built(version: str = VERSION, *compatible: str) -> Path:
        key = " ".join((version, *compatible))
        if key not in made:
            with fake_tensorrt(tensorrt=version):
                made[key] = export.build(
                    GOLDEN, tmp_path_factory.mktemp("full") / "bundle", backends=["tensorrt"], window=8, max_length=96,
                    compatible=list(compatible) or None,
                )  # fmt: skip
        return made[key]

    return built


def on_gpu(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int]) -> None:
    """Make the fake GPU another one."""
    real = FakeCuda.__init__

    def other(self: FakeCuda, device: int = 0) -> None:
        real(self, device)
        self.name, self.capability = name, capability

    monkeypatch.setattr(FakeCuda, "__init__", other)


# Building


@pytest.mark.parametrize("version", [VERSION, NEXT])
def test_networks_are_strongly_typed(build: Build, version: str) -> None:
    """By the flag of TensorRT 10; 11 has no flag and no other networks. The bundle decodes, with CUDA graphs."""
    bundle = build(version)
    entry = Bundle.open(bundle).engines("tensorrt")
    assert (entry["version"], entry["capabilities"], entry["compatible"]) == (version, ["current"], [])
    with fake_tensorrt(tensorrt=version), runtime.load(bundle, "tensorrt") as model:
        assert model.generate(PROMPT, gen_length=16).tokens
        assert device(model)[1].counts["launch"], "no pass was captured"


def test_without_the_flag_the_stub_refuses(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_engine, "hasattr", lambda *_: False, raising=False)
    with fake_tensorrt(tensorrt=VERSION), pytest.raises(AssertionError, match="weakly typed"):
        export.build(GOLDEN, tmp_path / "b", backends=["tensorrt"], window=8, max_length=96)


def test_weights_are_not_streamed(build: Build) -> None:
    """They are inputs: what is left in a plan, and could be streamed, are tables and constants."""
    root = build()
    for part in Bundle.open(root).config.parts:
        model = tensorrt.with_weights_as_inputs(root / "onnx" / f"{part}.onnx", 128)
        kept = {tensor.name: tensor.ByteSize() for tensor in model.graph.initializer}
        tables = {name for name in kept if name.startswith(("rotary_", "no_mask", "suppressed"))}
        assert sum(size for name, size in kept.items() if name not in tables) < 4096, kept
        assert not [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]


def test_a_machine_without_a_gpu(tmp_path: Path) -> None:
    with fake_tensorrt(tensorrt=VERSION) as made:
        made["tensorrt"].gpu = None
        with refused(BackendError, f"tensorrt {VERSION} compiles for the GPU", "finds none", "--flavour tensorrt_rtx"):
            export.build(GOLDEN, tmp_path / "b", backends=["tensorrt"])
    assert not (tmp_path / "b").exists()


def test_a_version_without_the_layers(tmp_path: Path) -> None:
    with (
        fake_tensorrt(tensorrt="10.14.1.48"),
        refused(BackendError, "10.14.1.48 lacks layers", "pip install 'tensorrt>=10.15.1'"),
    ):
        export.build(GOLDEN, tmp_path / "b", backends=["tensorrt"])


def test_what_compatible_refuses(tmp_path: Path) -> None:
    def built(*compatible: str, **options: Any) -> None:
        export.build(GOLDEN, tmp_path / "b", backends=["tensorrt"], compatible=list(compatible), **options)

    with fake_tensorrt(tensorrt=VERSION, tensorrt_lean=VERSION):
        with refused(OptionError, "compatible must be one of capability, ampere, and version, got hopper"):
            built("hopper")
        with refused(OptionError, "got ampere, capability", "leave one out"):
            built("ampere", "capability")
        with refused(OptionError, "compiles for the GPU of this machine", "leave --capability out"):
            built("ampere", capabilities=["8.9"])
        with refused(OptionError, "unknown TensorRT package 'tensorrt_lean'", "tensorrt, tensorrt_rtx"):
            built(flavour="tensorrt_lean")
    with fake_gpu(), refused(OptionError, "compiles for compute capabilities", "leave --compatible out"):
        built("ampere")


# GPUs


@pytest.mark.parametrize(
    ("compatible", "name", "capability", "loads"),
    [
        ((), "Fake GPU", (8, 9), True), ((), "Other GPU", (8, 9), False),
        (("capability",), "Other GPU", (8, 9), True), (("capability",), "Other GPU", (9, 0), False),
        (("ampere",), "Other GPU", (9, 0), True), (("ampere",), "Other GPU", (7, 5), False),
    ],
)  # fmt: skip
def test_gpus_that_an_engine_runs_on(
    build: Build, monkeypatch: pytest.MonkeyPatch, compatible: tuple[str, ...], name: str, capability: tuple[int, int],
    loads: bool,
) -> None:  # fmt: skip
    """The model it was built on; with `compatible`, those of its compute capability, or Ampere and later."""
    bundle = build(VERSION, *compatible)
    on_gpu(monkeypatch, name, capability)
    with fake_tensorrt(tensorrt=VERSION), runtime.load(bundle, "tensorrt") as model:
        if loads:
            assert model.generate(PROMPT, gen_length=4).tokens
        else:
            kept = [f"--compatible {kind}" for kind in compatible]
            targets = ", ".join(("current", *compatible))
            with refused(DeviceError, f"embed_128.plan on {name}", f"built for {targets})", "--force", *kept):
                model.generate(PROMPT, gen_length=4)


# tensorrt-lean


def test_lean_runs_what_is_built_for_it(build: Build) -> None:
    """It is taken where it has the version of the engines: alone, or beside a later tensorrt."""
    bundle = build(VERSION, "version")
    for there in ({"tensorrt_lean": VERSION}, {"tensorrt": NEXT, "tensorrt_lean": VERSION}):
        with fake_tensorrt(**there), runtime.load(bundle, "tensorrt") as model:
            assert f"tensorrt_lean {VERSION}" in model.model.device
            assert model.generate(PROMPT, gen_length=16).tokens and isinstance(made(model), Engine)
    with fake_tensorrt(tensorrt=VERSION, tensorrt_lean=VERSION):
        with runtime.load(bundle, "tensorrt") as model:
            assert f", tensorrt {VERSION}" in model.model.device
        with runtime.load(bundle, "tensorrt", flavour="tensorrt_lean") as model:
            assert f"tensorrt_lean {VERSION}" in model.model.device


def made(model: runtime.Runtime) -> Any:
    """An engine that TensorRT has made."""
    found: Any = device(model)[0].engine("embed", 128)
    return found.engine


def test_plans_have_no_code_for_the_host(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan with the lean runtime inside would be refused: it runs code of the bundle."""
    plan = next((build(VERSION, "version") / "engines/tensorrt").glob("*.plan")).read_bytes()
    assert b"VERSION_COMPATIBLE" in plan and b"EXCLUDE_LEAN_RUNTIME" in plan
    with fake_tensorrt(tensorrt=VERSION) as packages:
        logger = packages["tensorrt"].Logger()
        FakeCuda()
        unsafe = plan.replace(b', "EXCLUDE_LEAN_RUNTIME"', b"").replace(b'"EXCLUDE_LEAN_RUNTIME", ', b"")
        assert unsafe != plan and packages["tensorrt"].Runtime(logger).deserialize_cuda_engine(unsafe) is None
        assert packages["tensorrt"].Runtime(logger).deserialize_cuda_engine(plan) is not None


def test_engines_of_another_version(build: Build) -> None:
    whole, lean = build(), build(VERSION, "version")
    with fake_tensorrt(tensorrt=NEXT):
        with refused(BundleError, f"built by tensorrt {VERSION} and tensorrt {NEXT}", "install that version, or"):
            runtime.load(whole, "tensorrt")
        with refused(BundleError, f"tensorrt {NEXT} is installed", "that version or tensorrt_lean, or", "--force"):
            runtime.load(lean, "tensorrt")
    with fake_tensorrt(tensorrt_lean=VERSION):
        with refused(BackendError, "TensorRT is not installed", "elastic-diffusion[gpu]"):
            runtime.load(whole, "tensorrt")
        with refused(BundleError, "need all of tensorrt", "--compatible version"):
            runtime.load(whole, "tensorrt", flavour="tensorrt_lean")
    with fake_tensorrt(tensorrt=VERSION):
        with refused(BackendError, "TensorRT is not installed", "elastic-diffusion[lean]"):
            runtime.load(lean, "tensorrt", flavour="tensorrt_lean")
        with refused(OptionError, "unknown TensorRT package 'dispatch'", "tensorrt_lean"):
            runtime.load(lean, "tensorrt", flavour="dispatch")
