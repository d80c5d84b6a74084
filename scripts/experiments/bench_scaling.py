"""How cost grows with answer, prompt, window, layers and width, and the cost of a reuse step over its lower bound.

    python scripts/experiments/bench_scaling.py --work DIR [--out FILE] [--plot FILE]    about 15 minutes on two cores

Resumable with --out: a study that is in the file is not run again.

Models are random, on ONNX Runtime, and have the demo's shape except for what is varied. Generations commit a fixed
number of tokens per step, so that every point has the same schedule; gamma decides whether layers are refreshed (at 0
never). The lower bound of a step is the same matrix products alone, with the same shapes, in sessions of their own,
and the bytes it must read over the measured memory bandwidth.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import export
import runtime
from engines.config import ModelConfig
from engines.model import Model
from engines.runner import DriftInputs
from runtime.bench.breakdown import SLICES, break_down
from runtime.bench.cases import write
from runtime.bench.plots import figure, save
from scripts.experiments import report
from scripts.experiments.make_random_checkpoint import SHAPES, make_checkpoint

COMMITS = 8  # tokens per step
REPEATS = 5
WINDOW, TRACKED = 16, 8
LONGEST = 2100


def loaded(work: Path, weights: str | None = None, **changes: Any) -> runtime.Runtime:
    """Load a random model of the demo's shape with `changes`; it is built in `work` if it is not there."""
    shape = SHAPES["demo"] | {"max_sequence_length": LONGEST} | changes
    name = "-".join(f"{key}{value}" for key, value in changes.items()) or "demo"
    checkpoint, bundle = work / f"{name}-checkpoint", work / f"{name}-{weights or 'fp32'}"
    if not checkpoint.exists():
        make_checkpoint(checkpoint, shape)
    if not (bundle / "manifest.json").exists():
        export.build(checkpoint, bundle, window=64, track_num=4, weights=weights)
    return runtime.load(bundle, "onnxruntime")


def wide(width: int, layers: int) -> dict[str, Any]:
    """A shape of this width with heads of 64 and the MLP 2.75 times as wide, as in the demo."""
    heads = max(2, width // 64)
    return {"d_model": width, "n_heads": heads, "n_kv_heads": heads, "mlp_hidden_size": width * 11 // 4,
            "n_layers": layers}  # fmt: skip


def timed(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median seconds of a call, after one call to warm up."""
    run()
    found = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def generation(model: runtime.Runtime, prompt: int, answer: int, policy: str, **options: Any) -> dict[str, Any]:
    """Time one answer of fixed schedule."""
    ids = np.random.default_rng(0).integers(0, 1000, prompt)
    commit: dict[str, Any] = (
        {"tokens_per_step": COMMITS} if policy == "elastic" else {"steps": answer // COMMITS, "block_length": 32}
    )
    seconds = timed(
        lambda: model.generate(ids, policy, gen_length=answer, stop_at_eos=False, **commit, **options),
        2 if policy == "full" else 3,
    )
    return {"policy": policy, **options, "prompt": prompt, "answer": answer, "seconds": seconds,
            "tokens_per_second": answer / seconds}  # fmt: skip


def step(model: runtime.Runtime, length: int, rows: int, window: int = WINDOW) -> dict[str, Any]:
    """Time a reuse pass and a full pass per layer, the drift test's fraction, and the pass over its lower bound."""
    tracked = TRACKED
    engine, config = model.model, model.bundle.config
    runner = engine.new_runner(length)
    runner.embed(np.arange(length) % 1000)
    drift_inputs = DriftInputs(
        "row", np.arange(window, window + tracked), np.arange(window), np.ones(length, bool), np.arange(window)
    )
    runner.run_layers(length, drift_inputs)
    lower_bound = products(config, rows, length)
    reuse, fractions, alone = [], [], []
    runner.reuse(rows, drift_inputs, 0.0)
    lower_bound()
    for _ in range(3 * REPEATS):  # interleaved, so that a disturbance affects all of them
        before = drift_seconds(engine)
        began = time.perf_counter()
        runner.reuse(rows, drift_inputs, 0.0)
        reuse.append(time.perf_counter() - began)
        fractions.append((drift_seconds(engine) - before) / reuse[-1])
        began = time.perf_counter()
        lower_bound()
        alone.append(time.perf_counter() - began)
    full = timed(lambda: runner.run_layers(length, drift_inputs), 2)
    c, milli = config, 1e3 / config.layers
    read = 4 * (4 * c.d_model**2 + 3 * c.d_model * c.mlp_size + 2 * length * c.kv_heads * c.head_size)
    return {
        "width": c.d_model, "layers": c.layers, "length": length, "rows": rows, "window": window, "tracked": tracked,
        "reuse_ms_a_layer": statistics.median(reuse) * milli, "full_ms_a_layer": full * milli,
        "products_ms_a_layer": statistics.median(alone) * milli,
        "over_products": statistics.median(r / a for r, a in zip(reuse, alone, strict=True)),
        "drift_fraction": statistics.median(fractions), "bytes_a_layer": read,
        "cache_bytes_a_token": 4 * c.layers * (2 * c.kv_heads + c.heads) * c.head_size + 4 * (c.layers + 1) * c.d_model,
    }  # fmt: skip


def drift_seconds(model: Model) -> float:
    """Seconds that drift tests and probes have taken so far."""
    return sum(
        spent for part, spent in model.seconds.items() if part.startswith(("attention", "drift", "tests", "probe"))
    )


def products(config: ModelConfig, rows: int, length: int) -> Callable[[], None]:
    """A call that runs only the matrix products of a reuse pass, in all layers and with the same shapes."""
    c, rng = config, np.random.default_rng(0)
    q, kv = c.heads * c.head_size, c.kv_heads * c.head_size
    d, m = c.d_model, c.mlp_size
    matrices = {"q": (d, q), "k": (d, kv), "v": (d, kv), "out": (q, d), "gate": (d, m), "up": (d, m), "down": (m, d)}
    inputs = {"x": (1, rows, c.d_model), "a": (1, rows, q), "m": (1, rows, c.mlp_size),
              "queries": (1, c.kv_heads, rows * c.heads // c.kv_heads, c.head_size),
              "keys": (1, c.kv_heads, length, c.head_size)}  # fmt: skip
    inputs |= {"weights": (*inputs["queries"][:3], length)}
    of = {"out": "a", "down": "m"}
    nodes = [helper.make_node("MatMul", [of.get(name, "x"), f"w_{name}"], [name]) for name in matrices]
    nodes.append(helper.make_node("Transpose", ["keys"], ["turned"], perm=[0, 1, 3, 2]))
    nodes.append(helper.make_node("MatMul", ["queries", "turned"], ["scores"]))
    nodes.append(helper.make_node("MatMul", ["weights", "keys"], ["attended"]))
    graph_inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in (*matrices, "scores", "attended")]
    runs = []
    for _ in range(c.layers):
        weights = [numpy_helper.from_array(rng.standard_normal(s, np.float32), f"w_{n}") for n, s in matrices.items()]
        graph = helper.make_graph(nodes, "products", graph_inputs, results, weights)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        options.add_session_config_entry("session.use_env_allocators", "1")
        session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for name, shape in inputs.items():
            binding.bind_cpu_input(name, rng.standard_normal(shape, np.float32))
        for result in results:
            binding.bind_output(result.name, "cpu")
        runs.append((session, binding))

    def run() -> None:
        for session, binding in runs:
            session.run_with_iobinding(binding)

    return run


def bandwidth() -> float:
    """Bytes per second that one thread reads, from a sum over an array larger than any cache."""
    block = np.ones(1 << 27, np.float32)
    return block.nbytes / timed(lambda: block.sum())


def exponent(points: list[dict[str, Any]], over: str, cost: str) -> float:
    """The slope of log cost over log size: a straight line fitted to all points."""
    sizes, costs = ([max(1e-9, float(p[name])) for p in points] for name in (over, cost))
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def answers(work: Path) -> dict[str, Any]:
    """Cost over the answer's length, by policy."""
    ways: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("full", "full", {}), ("elastic, a refresh a step", "elastic", {"gamma": 1.0}),
        ("elastic, no refresh", "elastic", {"gamma": 0.0}),
        ("the same, max_masks 128", "elastic", {"gamma": 0.0, "max_masks": 128}),
    )  # fmt: skip
    found = {}
    with loaded(work) as demo:
        for name, policy, options in ways:
            points = [generation(demo, 128, n, policy, **options) for n in (64, 128, 256, 512, 1024)]
            found[name] = {"points": points, "exponent": exponent(points, "answer", "seconds")}
    return found


def prompts(work: Path) -> dict[str, Any]:
    """Cost over the prompt's length."""
    with loaded(work) as demo:
        points = [
            generation(demo, n, 128, "elastic", gamma=0.0) | {"total": n + 128} for n in (1, 100, 300, 500, 700, 900)
        ]
    return {"points": points, "exponent": exponent(points, "total", "seconds")}


def windows(work: Path) -> dict[str, Any]:
    """A reuse step over the window."""
    with loaded(work) as demo:
        points = [step(demo, 640, 2 * n + TRACKED, window=n) for n in (4, 8, 16, 32, 64)]
    return {"points": points, "exponent": exponent(points, "rows", "reuse_ms_a_layer")}


def lengths(work: Path) -> dict[str, Any]:
    """A reuse step over the sequence's length."""
    with loaded(work) as demo:
        points = [step(demo, n, 32) for n in (64, 128, 256, 512, 1024)]
    return {"points": points, "exponent": exponent(points, "length", "reuse_ms_a_layer")}


def layers(work: Path) -> dict[str, Any]:
    """A reuse step over the number of layers."""
    points = []
    for count in (2, 4, 8, 16):
        with loaded(work, n_layers=count) as model:
            point = step(model, 640, 32)
            points.append(point | {"reuse_ms": point["reuse_ms_a_layer"] * count})
    return {"points": points, "exponent": exponent(points, "layers", "reuse_ms")}


def widths(work: Path) -> dict[str, Any]:
    """A reuse step over the model's width."""
    points, bytes_a_second = list[dict[str, Any]](), bandwidth()
    for width in (128, 256, 512, 1024, 2048):
        with loaded(work, **wide(width, 4 if width < 2048 else 2)) as model:
            points += [step(model, length, 48) for length in (64, 256, 1024)]
    for point in points:
        point["bandwidth_ms_a_layer"] = 1e3 * point["bytes_a_layer"] / bytes_a_second
    longest = [point for point in points if point["length"] == 1024]
    slope = exponent(longest, "width", "reuse_ms_a_layer")
    return {"points": points, "exponent": slope, "bandwidth": bytes_a_second}


def overhead(work: Path) -> dict[str, Any]:
    """The time of a reuse step outside the engines, including the controller."""
    points = []
    for width in (128, 1024):
        with loaded(work, **wide(width, 8)) as model:
            drawn = [np.random.default_rng(seed).integers(0, 1000, 500) for seed in range(4)]
            split = break_down(model, drawn, 128, "elastic", {"tokens_per_step": COMMITS, "gamma": 0.0})["reuse"]
            outside = sum(split[name] for name in ("dispatch", "cache upkeep", "sampling", "Python"))
            points.append({"width": width, "outside": outside / sum(split[name] for name in SLICES), **split})
    return {"points": points}


def quantized(work: Path) -> dict[str, Any]:
    """A reuse step with weights in fewer bits."""
    points = []
    for weights in (None, "int8", "int4"):
        for width in (128, 1024):
            with loaded(work, weights, **wide(width, 4)) as model:
                points.append(step(model, 1024, 48) | {"weights": weights or "fp32"})
    return {"points": points}


STUDIES = {"width": widths, "overhead": overhead, "weights": quantized, "window": windows, "length": lengths,
           "layers": layers, "prompt": prompts, "answer": answers}  # fmt: skip


def studies(work: Path, file: Path | None) -> dict[str, Any]:
    """Run all studies except those that `file` holds."""
    found = report.resumed(file, {"studies": {}})
    for name, study in STUDIES.items():
        if name not in found["studies"]:
            found["studies"][name] = study(work)
            with loaded(work) as demo:
                found |= report.about(__file__, [demo]) | {"commits": COMMITS}
            print(name, "done", file=sys.stderr, flush=True)
            if file:
                write(found, file)
    return found


def plot(found: dict[str, Any], file: Path) -> None:
    """Draw cost over answer and width on logarithmic axes, and the drift test's fraction over width."""
    chart = figure(12, 3.6)
    left, middle, right = chart.subplots(1, 3)
    for name, study in found["studies"]["answer"].items():
        points = study["points"]
        label = f"{name} (exponent {study['exponent']:.2f})"
        left.loglog([p["answer"] for p in points], [p["seconds"] for p in points], marker="o", label=label)
    left.set(xlabel="tokens of the answer", ylabel="seconds", title="prompt 128, 8 commits per step")
    points = [p for p in found["studies"]["width"]["points"] if p["length"] == 1024]
    lines = {"full": "full pass", "reuse": "reuse step", "products": "its matrix products", "bandwidth": "its bytes"}
    for cost, label in lines.items():
        costs = [p[f"{cost}_ms_a_layer"] for p in points]
        middle.loglog([p["width"] for p in points], costs, marker="o", label=label)
    middle.set(xlabel="width", ylabel="ms per layer", title="48 rows, length 1024")
    for length in (64, 256, 1024):
        points = [p for p in found["studies"]["width"]["points"] if p["length"] == length]
        percent = [100 * p["drift_fraction"] for p in points]
        right.semilogx([p["width"] for p in points], percent, marker="o", label=f"length {length}")
    right.set(xlabel="width", ylabel="% of a reuse step", title="drift test and probe", ylim=(0, None))
    for axes in (middle, right):
        axes.set_xticks([128, 256, 512, 1024, 2048], labels=["128", "256", "512", "1024", "2048"])
        axes.minorticks_off()
    for axes in (left, middle, right):
        axes.legend(fontsize=8)
        axes.grid(True, which="major", alpha=0.3)
    save(chart, file)


def main() -> None:
    args = report.parser(__doc__).parse_args()
    found = studies(args.work, args.out)
    report.finish(found, args, lambda file: plot(found, file))


if __name__ == "__main__":
    main()
