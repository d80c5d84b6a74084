"""How long the steps of a bundle take on every back end that runs on a GPU, and what they are made of."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from engines import registry as backends
from engines.bundle import Bundle
from engines.errors import ElasticError
from engines.gpu.cuda import Cuda
from engines.gpu.model import GpuModel
from engines.gpu.runner import GpuRunner
from engines.model import Model
from engines.runner import DriftInputs, SequenceRunner
from scripts.gpu.cuda_calls import bandwidth
from scripts.gpu.report import REPEATS, queued, timed


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
            runner.embed(np.full(model.capacity.rows, number))
            runner.reuse(model.capacity.rows, drift_inputs, 0.0)
        return 1 - waited / (time.perf_counter() - began)
    finally:
        cuda.sync = wait


def waiting(model: Model) -> Callable[[], None]:
    """The function that waits for the GPU on a model's back end."""
    if hasattr(model, "cuda"):
        return model.cuda.sync  # type: ignore[no-any-return]
    import torch

    return torch.cuda.synchronize if torch.cuda.is_available() else lambda: None


def figures(bundle: Bundle, length: int, window: int) -> dict[str, Any]:
    """The steps of every back end that runs on this GPU, and those against the lower limit of weight bytes."""
    weights = sum(bundle.weights(part).stat().st_size for part in bundle.config.parts if part != "embed")
    cuda = Cuda()
    speed = bandwidth(cuda)["copy_gb_per_second"]
    cuda.close()
    floor = weights / speed / 1e6
    found: dict[str, Any] = {
        "layers": bundle.config.layers, "length": length, "window": window, "weight_gb": weights / 1e9,
        "copy_gb_per_second": speed, "floor_ms": floor, "ms": {},
    }  # fmt: skip
    for name, options in (("eager", {}), ("onnxruntime", {"provider": "cuda"}), ("tensorrt", {})):
        try:
            model = backends.load(bundle, name, **options)
        except ElasticError as error:
            found["ms"][name] = str(error)
            continue
        began = time.perf_counter()
        found["ms"][name] = steps(model, length, window, waiting(model))
        found[f"seconds of {name}"] = time.perf_counter() - began
        if isinstance(model, GpuModel):
            found[f"parts of {name}"] = gpu_figures(model, length, window)
            found[f"{name} over floor"] = found["ms"][name]["reuse"] / floor
        model.close()
    return found


def ten_times(work: Callable[[], None]) -> None:
    for _ in range(10):
        work()


def gpu_figures(model: GpuModel, length: int, window: int) -> dict[str, Any]:
    """Parts of a reuse step, what its graph saves and holds, the host's share, and where the start's seconds went."""
    runner = model.new_runner(length)
    assert isinstance(runner, GpuRunner)
    cuda, queue, rows = model.cuda, runner.pass_queue, model.capacity.rows
    drift_inputs = make_drift_inputs(runner, length, window)
    parts: dict[str, Callable[[], None]] = {
        "embed": lambda: queue.embed(rows), "save_previous": lambda: queue.save_previous(0, rows),
        "layer": lambda: queue.layer(0, rows), "tests": lambda: queue.tests(0, rows, "row"),
        "head": lambda: queue.head(window),
    }  # fmt: skip
    microseconds = {}
    for name, work in parts.items():
        work()
        cuda.sync()
        if model.capturable:
            graph = cuda.capture(partial(ten_times, work))
            microseconds[name] = 1e5 * queued(partial(cuda.launch, graph), cuda.sync)
            cuda.destroy(graph)
        else:
            microseconds[name] = 1e5 * queued(partial(ten_times, work), cuda.sync)

    def reuse() -> None:
        runner.embed(np.ones(rows, np.int64))
        runner.reuse(rows, drift_inputs, 0.0)

    queue.release()
    reuse()
    free = cuda.memory()[0]
    reuse()  # captures
    graph_mb = (free - cuda.memory()[0]) / 1e6
    usual, capturable = timed(reuse, cuda.sync), model.capturable
    model.capturable = False
    queue.release()
    plain = timed(reuse, cuda.sync)
    model.capturable = capturable
    scratch = {
        name: [plan.get_device_memory_size_for_profile_v2(p) for p in range(plan.num_optimization_profiles)]
        for name, plan in ((name, engine.engine) for name, engine in getattr(model, "engines", {}).items())
    }  # fmt: skip
    return {
        "parts_us": microseconds, "captured": capturable, "reuse_ms": 1e3 * usual, "reuse_uncaptured_ms": 1e3 * plain,
        "graph_mb": graph_mb, "host_fraction_of_a_reuse_step": host_fraction(model, length, window),
        "uncaptured": [str(key) for key in queue.uncaptured], "scratch_bytes": scratch,
        "startup_seconds": getattr(model, "startup", {}), "free_gb": cuda.memory()[0] / 1e9,
    }  # fmt: skip
