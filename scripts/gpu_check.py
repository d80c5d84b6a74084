"""Checks that need a GPU: which TensorRT runs on it, whether its results are right, and how fast a step is.

    bash scripts/gpu_check.sh --work DIR           about 50 GB of disk for the full LLaDA-8B shape
    bash scripts/gpu_check.sh --work DIR --layers 4

In this order: (a) which TensorRT package loads on this compute capability; (b) the tests marked `gpu`; (c) on random
weights of the shape, in fp16: milliseconds of a reuse step and of refreshes from several layers, on every back end that
runs, against the lower limit that weight bytes and memory speed set; (d) on the same weights: how fast
TensorRT decodes several prompts side by side, and whether each prompt gets the tokens that it gets alone.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import export
from engines import registry as backends
from engines.bundle import Bundle
from engines.cli import run
from engines.errors import ElasticError
from engines.gpu.cuda import Cuda
from engines.model import Model
from engines.registry import versions
from engines.runner import DriftInputs, ReusePass, SequenceRunner
from engines.trt.package import CURRENT, FLAVOURS, find
from runtime.decoding.generate import Output
from scripts.experiments.make_random_checkpoint import SHAPES, make_checkpoint

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "benchmarks"
REPEATS = 20
SIZES = 1, 2, 4, 8, 16  # of batches


def packages(work: Path) -> dict[str, Any]:
    """Which TensorRT package runs engines on this GPU: built for this GPU, and for 8.0."""
    checkpoint = work / "small"
    if not checkpoint.exists():
        make_checkpoint(checkpoint, SHAPES["tiny"] | {"d_model": 64, "n_heads": 2, "n_kv_heads": 2})
    found: dict[str, Any] = {}
    for name in FLAVOURS:
        for target in (CURRENT, "8.0"):
            try:
                ahead = find(name).ahead_of_time
                bundle = export.build(
                    checkpoint, work / f"small-{name}-{target}", precision="fp16", backends=["tensorrt"],
                    flavour=name, capabilities=[target] if ahead else None, force=True,
                )  # fmt: skip
                with runtime_of(bundle) as model:
                    logits = model.logits(np.arange(8))
                found[f"{name} for {target if ahead else CURRENT}"] = bool(np.isfinite(logits).all())
            except ElasticError as error:
                found[f"{name} for {target}"] = str(error)
    return found


def runtime_of(bundle: Path) -> Any:
    """A bundle loaded on TensorRT."""
    import runtime

    return runtime.load(bundle, "tensorrt")


def copy_bandwidth(cuda: Cuda, size: int = 1 << 30) -> float:
    """Bytes per second, read and written, of a copy on the device."""
    a, b = cuda.alloc(size, "a copy"), cuda.alloc(size, "a copy")
    seconds = timed(lambda: cuda.copy(a, b, size), cuda.sync)
    cuda.free(a)
    cuda.free(b)
    return 2 * size / seconds


def timed(work: Callable[[], Any], sync: Callable[[], None]) -> float:
    """Median seconds of `work` and the wait for it."""
    seconds = []
    for _ in range(REPEATS + 3):
        sync()
        began = time.perf_counter()
        work()
        sync()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[3:])


def make_drift_inputs(runner: SequenceRunner, length: int, window: int) -> DriftInputs:
    """Drift inputs with eight tracked tokens before a window of masks, in a sequence of `length` positions."""
    masks = np.arange(8, 8 + window)
    return DriftInputs(
        kind="row", tracked=np.arange(8), window=masks, probe_keys=np.arange(runner.slots) < length, logits_rows=masks
    )


def steps(model: Model, length: int, window: int, sync: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of a reuse step, of refreshes from layer 1, half and 28 of 32, and of a full step."""
    runner, layers = model.new_runner(length), model.config.layers
    rows = runner.padded_rows or 2 * window
    everything = runner.slots if runner.padded_rows else length
    drift_inputs = make_drift_inputs(runner, length, window)
    runner.embed(np.ones(everything, np.int64))
    runner.run_layers(everything, drift_inputs)

    def reuse() -> None:
        runner.embed(np.ones(rows, np.int64))
        runner.reuse(rows, drift_inputs, 0.0)
        runner.head(drift_inputs.window)

    found = {"reuse": timed(reuse, sync)}
    for first in sorted({1, layers // 2, layers * 28 // 32}):
        found[f"refresh from {first}"] = timed(partial(runner.run_layers, everything, drift_inputs, first), sync)
    found["full"] = timed(lambda: runner.run_layers(everything, None), sync)
    return {name: 1e3 * seconds for name, seconds in found.items()}


def host_fraction(model: Model, length: int, window: int) -> float:
    """The fraction of a reuse step in which the host works: all but its waits."""
    cuda, waited = model.cuda, 0.0  # type: ignore[attr-defined]
    wait = cuda.sync

    def sync() -> None:
        nonlocal waited
        began = time.perf_counter()
        wait()
        waited += time.perf_counter() - began

    cuda.sync = sync
    try:
        runner = model.new_runner(length)
        drift_inputs = make_drift_inputs(runner, length, window)
        for number in range(REPEATS + 3):
            if number == 3:
                waited, began = 0.0, time.perf_counter()
            runner.embed(np.full(runner.padded_rows, number))
            runner.reuse(runner.padded_rows, drift_inputs, 0.0)
        return 1 - waited / (time.perf_counter() - began)
    finally:
        cuda.sync = wait


def batch_figures(model: Any, sizes: Iterable[int], length: int, window: int, gen_length: int) -> dict[str, Any]:
    """Part (d), by batch size: milliseconds of a reuse pass, and figures of decoding prompts of different lengths.

    Decoding is measured without and with refreshes. A size that does not fit has its error instead, and larger ones
    are left out.
    """
    found: dict[str, Any] = {}
    rng, config = np.random.default_rng(0), model.model.config
    ordinary = min(config.mask_id, config.eos_id, config.vocab)
    lengths = rng.integers(1, length - gen_length, max(sizes))
    prompts = [rng.integers(0, ordinary, count) for count in lengths]
    options: list[dict[str, Any]] = [
        {"gamma": gamma, "window": window, "gen_length": gen_length, "stop_at_eos": False} for gamma in (0.0, 0.9)
    ]
    alone = [[model.generate(prompt, **chosen) for prompt in prompts] for chosen in options]
    for size in sizes:
        try:
            found[str(size)] = {
                "reuse_ms": 1e3 * batched_pass(model.model, size, length, window),
                "decoding": [decoding(model, prompts, size, *case) for case in zip(options, alone, strict=True)],
            }
        except ElasticError as error:
            found[str(size)] = str(error)
            break
    return found


def batched_pass(model: Model, size: int, length: int, window: int) -> float:
    """Seconds of a reuse pass of `size` sequences."""
    runners = model.new_runners([(length, length)] * size)
    passes = [
        ReusePass(runner, runner.padded_rows, make_drift_inputs(runner, length, window), 0.0) for runner in runners
    ]
    for due in passes:
        due.runner.embed(np.ones(due.runner.slots, np.int64))
        due.runner.run_layers(due.runner.slots, due.drift_inputs)

    def reuse() -> None:
        for due in passes:
            due.runner.embed(np.ones(due.rows, np.int64))
        model.reuse(passes)

    return timed(reuse, waiting(model))


def decoding(
    model: Any, prompts: list[Any], size: int, options: dict[str, Any], alone: list[Output]
) -> dict[str, Any]:  # fmt: skip
    """Tokens per second in batches of `size`, in the second of two runs, and how many sequences are as they are alone.

    `closest` holds the smallest margin of a decision of each sequence that differs: in half precision, a small one may
    go either way.
    """
    for _ in range(2):
        began = time.perf_counter()
        outs = [
            out
            for start in range(0, len(prompts), size)
            for out in model.generate_batch(prompts[start : start + size], **options)
        ]
        seconds = time.perf_counter() - began
    others = [theirs for ours, theirs in zip(outs, alone, strict=True) if ours.sequence != theirs.sequence]
    return {
        "gamma": options["gamma"], "tokens_per_second": sum(out.tokens for out in outs) / seconds,
        "refreshes": sum(event.refreshed(model.bundle.config.layers) for out in outs for event in out.trace),
        "sequences": len(outs), "equal_to_alone": len(outs) - len(others),
        "closest": [min(event.margin for event in out.trace) for out in others],
    }  # fmt: skip


def bundle_of(work: Path, shape: str, layers: int | None, length: int, window: int) -> Bundle:
    """The bundle of random weights of `shape`, compiled for this GPU; built if it is not there."""
    numbers = SHAPES[shape] | ({"n_layers": layers} if layers else {})
    checkpoint, out = work / f"{shape}-{layers or 'all'}", work / f"{shape}-{layers or 'all'}-bundle"
    if not checkpoint.exists():
        make_checkpoint(checkpoint, numbers, dtype="fp16")
    return Bundle.open(export.build(
        checkpoint, out, precision="fp16", backends=["tensorrt"], max_length=length, window=window,
        max_batch=max(SIZES),
    ))  # fmt: skip


def shape_figures(bundle: Bundle, length: int, window: int) -> dict[str, Any]:
    """Part (c): the steps of every back end that runs on this GPU."""
    weights = sum(bundle.weights(part).stat().st_size for part in bundle.config.parts if part != "embed")
    cuda = Cuda()
    bandwidth = copy_bandwidth(cuda)
    cuda.close()
    floor = 1e3 * weights / bandwidth
    found: dict[str, Any] = {
        "layers": bundle.config.layers, "length": length, "window": window, "weight_gb": weights / 1e9,
        "copy_gb_per_second": bandwidth / 1e9, "floor_ms": floor, "ms": {},
    }  # fmt: skip
    for name, options in (("eager", {}), ("onnxruntime", {"provider": "cuda"}), ("tensorrt", {})):
        try:
            model = backends.load(bundle, name, **options)
        except ElasticError as error:
            found["ms"][name] = str(error)
            continue
        found["ms"][name] = steps(model, length, window, waiting(model))
        if name == "tensorrt":
            found["host_fraction_of_a_reuse_step"] = host_fraction(model, length, window)
            found["reuse_over_floor"] = found["ms"][name]["reuse"] / floor
        model.close()
    return found


def waiting(model: Model) -> Callable[[], None]:
    """The function that waits for the GPU on a model's back end."""
    if hasattr(model, "cuda"):
        return model.cuda.sync  # type: ignore[no-any-return]
    import torch

    return torch.cuda.synchronize


def check(args: argparse.Namespace) -> None:
    """Run all parts; raises DeviceError if there is no GPU, before anything is written."""
    cuda = Cuda()
    capability = ".".join(map(str, cuda.capability))
    report: dict[str, Any] = {
        "command": "scripts/gpu_check.sh " + " ".join(sys.argv[1:]), "device": cuda.name, "capability": capability,
        "versions": versions(), "platform": f"{platform.system()} {platform.machine()}",
    }  # fmt: skip
    cuda.close()
    file = OUT / f"gpu_{cuda.name.lower().replace(' ', '_')}.json"

    def note(name: str, figures: Any) -> None:
        report[name] = figures
        file.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps({name: figures}), flush=True)

    args.work.mkdir(parents=True, exist_ok=True)
    note("packages", packages(args.work))
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"], cwd=ROOT, capture_output=True,
                           text=True)  # fmt: skip
    note("tests", {"exit": tests.returncode, "output": tests.stdout.splitlines()[-8:]})
    bundle = bundle_of(args.work, args.shape, args.layers, args.max_length, args.window)
    note("steps", shape_figures(bundle, args.max_length, args.window))
    with runtime_of(bundle.root) as model:
        note("batches", batch_figures(model, SIZES, args.max_length, args.window, args.gen_length))
    print(f"[ok] written to {file}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and bundles")
    parser.add_argument("--shape", choices=list(SHAPES), default="llada-8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--max-length", type=int, default=1400)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--gen-length", type=int, default=64, help="tokens of each answer of a batch (default 64)")
    return run(check, parser.parse_args(), "interrupted; the finished parts are written")


if __name__ == "__main__":
    sys.exit(main())
