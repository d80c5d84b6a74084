"""Checks that need a GPU: which TensorRT runs on it, whether its results are right, and how fast a step is.

    bash scripts/gpu_check.sh device --work DIR    CUDA's calls, and one layer on TensorRT in every variant
    bash scripts/gpu_check.sh layers --work DIR    four layers: parity, the tests marked `gpu`, steps and their parts
    bash scripts/gpu_check.sh model --work DIR     the whole shape: steps, batches, start-up; 40 GB in DIR
    bash scripts/gpu_check.sh provider --work DIR  ONNX Runtime's CUDA provider: kernels, parity, captures, steps

Each part takes minutes and writes docs/benchmarks/gpu_<device>_<part>.json after every figure; what fails leaves its
error there and the rest goes on. `prepare` makes what `model` needs ahead, and its checkpoint alone where TensorRT is
missing.
"""

import argparse
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import export
import runtime
from engines.bundle import Bundle
from engines.cli import run
from engines.errors import BackendError, DeviceError, ParityError
from engines.gpu.cuda import Cuda
from engines.registry import versions
from engines.trt.package import CURRENT, find
from export.verify import verify
from scripts.experiments.make_random_checkpoint import COMMON, SHAPES, make_checkpoint
from scripts.gpu import batches, compiler, cuda_calls, steps
from scripts.gpu.report import Report

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "benchmarks"
ROWS = 64  # of a reuse pass, in every part
FEW = 4  # layers of the part `layers`
TOLERANCE = 5e-2


def device(report: Report, args: argparse.Namespace) -> None:
    """CUDA's calls, then one layer on TensorRT: capabilities, captures, specialisation, streams, addresses."""
    cuda = Cuda()
    note = report.note
    for name in ("bandwidth", "copies", "captures", "large_graph"):
        note(name, partial(getattr(cuda_calls, name), cuda))
    note("pytorch", cuda_calls.pytorch)
    package = note("package", lambda: find(args.flavour).name)
    if package is None:
        return
    raw = COMMON | SHAPES[args.shape] | {"max_sequence_length": args.positions[0]}
    layer = compiler.Layer(cuda, find(package), raw, window_of(raw["n_layers"]))
    for capability in (CURRENT, *args.capabilities):
        note(f"plan for {capability}", partial(compiler.capability_figures, layer, capability))
    engine = note("an engine", lambda: str(load(layer, report)))
    if engine is None:
        return
    made = report.engine  # type: ignore[attr-defined]
    for how in ("EAGER", "LAZY", "NONE"):
        note(f"specialisation {how}", partial(compiler.specialisation_figures, layer, made, how))
    note("runtime cache", partial(compiler.runtime_cache, layer, made))
    note("one context, three address sets", partial(compiler.shared_context, layer, made))
    note("streams", partial(compiler.streams_figures, layer))
    note("capture without the flag", partial(compiler.capture_without_flag, layer))
    report.content["messages"] = layer.messages[-40:]
    note("misaligned", partial(compiler.misaligned, layer, made))


def load(layer: compiler.Layer, report: Report) -> Any:
    """An engine for this GPU, kept for the measurements that follow."""
    report.engine = layer.engine(layer.plan())  # type: ignore[attr-defined]
    return report.engine  # type: ignore[attr-defined]


def layers(report: Report, args: argparse.Namespace) -> None:
    """A few layers of the shape: parity with eager PyTorch, the tests marked `gpu`, steps and their parts."""
    bundle = report.note("bundle", lambda: str(bundle_of(args.work, args.shape, FEW, args.positions, 4, args.backend)))
    if bundle is not None:
        report.note("parity", partial(parity, Bundle.open(bundle), args.backend))
        for length in args.positions:
            report.note(f"steps at {length}", partial(steps.figures, Bundle.open(bundle), length, window_of(FEW)))
    report.note("tests", gpu_tests)


def model(report: Report, args: argparse.Namespace) -> None:
    """The whole shape: steps at each length, and prompts side by side."""
    count = SHAPES[args.shape]["n_layers"]
    bundle = report.note(
        "bundle", lambda: str(bundle_of(args.work, args.shape, count, args.positions, args.batch, args.backend))
    )
    if bundle is None:
        return
    for length in args.positions:
        report.note(f"steps at {length}", partial(steps.figures, Bundle.open(bundle), length, window_of(count)))

    if args.backend == "onnxruntime":
        from scripts.gpu.provider import captured_steps

        length = args.positions[0]
        report.note("captured steps", lambda: captured_steps(Bundle.open(bundle), length, window_of(count)))

    def side_by_side() -> dict[str, Any]:
        sizes = [size for size in batches.SIZES if size <= args.batch]
        with runtime.load(bundle, args.backend) as loaded:
            return batches.batch_figures(loaded, sizes, args.positions[0], window_of(count), args.gen_length)

    report.note("batches", side_by_side)


def prepare(args: argparse.Namespace) -> None:
    """Make the checkpoint of the whole shape, and its bundle where TensorRT is installed."""
    count = SHAPES[args.shape]["n_layers"]
    shutil.rmtree(args.work / f"{args.shape}-{count}.part", ignore_errors=True)
    try:
        bundle_of(args.work, args.shape, count, args.positions, args.batch, args.backend)
    except BackendError as error:
        print(f"no bundle yet: {error}")


def provider(report: Report, args: argparse.Namespace) -> None:
    """ONNX Runtime's CUDA provider on a few layers of the shape, and the demo model's tokens."""
    import torch  # noqa: F401  # loads the CUDA libraries that the provider needs

    from scripts.gpu import provider as ort_gpu

    demo = report.note("demo", lambda: str(built("demo", args.work / "demo-fp16", [])))
    if demo is not None:
        report.note("placement, demo", lambda: ort_gpu.placement(Bundle.open(demo)))
        report.note("parity, demo", lambda: parity(Bundle.open(demo), "onnxruntime"))
        report.note("tokens, demo", lambda: ort_gpu.same_tokens(demo))
    made = report.note("bundle", lambda: str(bundle_of(args.work, args.shape, FEW, args.positions, 4, "onnxruntime")))
    if made is not None:
        report.note("parity", lambda: parity(Bundle.open(made), "onnxruntime"))
        for length in args.positions:
            report.note(f"steps at {length}", partial(steps.figures, Bundle.open(made), length, window_of(FEW)))
            report.note(
                f"captured steps at {length}",
                partial(ort_gpu.captured_steps, Bundle.open(made), length, window_of(FEW)),
            )


def window_of(count: int) -> int:
    """The window with which a reuse pass of a model of `count` layers has ROWS rows."""
    return (ROWS - count) // 2


def parity(bundle: Bundle, backend: str) -> list[Any]:
    """The difference of each part from eager PyTorch, and what `verify` says of them where one is too large."""
    rows: list[Any] = []
    try:
        for row in verify(bundle, backend, TOLERANCE):
            rows.append(asdict(row))
    except ParityError as error:
        rows.append(str(error))
    return rows


def gpu_tests() -> dict[str, Any]:
    """The tests marked `gpu`."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rA", "-m", "gpu", "tests/engines/gpu"], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    print(done.stdout[-6000:])
    return {"exit": done.returncode, "output": done.stdout.splitlines()[-30:]}


def checkpoint_of(work: Path, shape: str, count: int) -> Path:
    """The checkpoint of random weights with `count` layers of `shape`; made if it is not there, waited for if it is
    being made."""
    out, partial_out = work / f"{shape}-{count}", work / f"{shape}-{count}.part"
    while partial_out.exists():
        time.sleep(0.5)
    if not out.exists():
        make_checkpoint(partial_out, SHAPES[shape] | {"n_layers": count}, dtype="fp16")
        partial_out.rename(out)
    return out


def bundle_of(work: Path, shape: str, count: int, positions: list[int], batch: int, backend: str) -> Path:
    """The bundle of that checkpoint for `backend`; built if it is not there."""
    checkpoint, out = checkpoint_of(work, shape, count), work / f"{shape}-{count}-{backend}"
    engines = ["tensorrt"] if backend == "tensorrt" else []  # ONNX Runtime runs the exported parts on a GPU
    return built(checkpoint, out, engines, max_length=max(positions), window=window_of(count), max_batch=batch)


def built(checkpoint: str | Path, out: Path, engines: list[str], **sizes: Any) -> Path:
    """The bundle in `out`, in fp16 and compiled for this GPU; built if it is not there."""
    here = [CURRENT] if engines and find().ahead_of_time else None
    return export.build(checkpoint, out, precision="fp16", backends=engines, capabilities=here, **sizes)


PARTS = {"device": device, "layers": layers, "model": model, "provider": provider}


def check(args: argparse.Namespace) -> None:
    """Run one part; raises DeviceError if there is no GPU, or after the part where something failed."""
    args.work.mkdir(parents=True, exist_ok=True)
    if args.part == "prepare":
        prepare(args)
        return
    cuda = Cuda()
    name = cuda.name.lower().replace(" ", "_")
    head = {
        "command": "scripts/gpu_check.sh " + " ".join(sys.argv[1:]), "device": cuda.name,
        "capability": ".".join(map(str, cuda.capability)), "memory_gb": cuda.memory()[1] / 1e9,
        "versions": versions(), "platform": f"{platform.system()} {platform.machine()}",
    }  # fmt: skip
    cuda.close()
    report = Report(args.out / f"gpu_{name}_{args.part}.json", head)
    PARTS[args.part](report, args)
    if report.failed:
        raise DeviceError(f"{', '.join(report.failed)} failed; {report.file} has the errors")
    print(f"[ok] written to {report.file}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=[*PARTS, "prepare"])
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and bundles")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the figures (default docs/benchmarks)")
    parser.add_argument("--shape", choices=list(SHAPES), default="llada-8b")
    parser.add_argument("--backend", choices=["tensorrt", "onnxruntime"], default="tensorrt", help="of `model`")
    parser.add_argument("--flavour", help="the TensorRT package (default: the first that is installed)")
    parser.add_argument("--capabilities", nargs="*", default=["8.0", "8.9", "12.0"], help="of plans tried by `device`")
    parser.add_argument("--positions", type=int, nargs="+", default=[1024, 4096], help="lengths that are measured")
    parser.add_argument("--batch", type=int, default=16, help="the largest batch of `model` (default 16)")
    parser.add_argument("--gen-length", type=int, default=64, help="tokens of each answer of a batch (default 64)")
    return run(check, parser.parse_args(), "interrupted; the finished figures are written")


if __name__ == "__main__":
    sys.exit(main())
