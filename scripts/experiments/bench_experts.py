"""What a mixture of experts costs: the share of experts that a pass touches, and its time both ways.

    python scripts/experiments/bench_experts.py --work DIR [--out FILE]    about three minutes, 12 GB of memory

One mixture of each published shape with random weights and a random router, whose choices are near to even, as those
of a trained router are meant to be. `touched` computes the experts that a row takes, `all` every expert on every row as
one product. Both are timed on one core with ONNX Runtime, interleaved, and the first in eager PyTorch. For a GPU the
bytes of weights that each way reads are what can be said without one.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engines.config import ExpertsConfig
from engines.eager import layers
from engines.registry import versions
from engines.signatures import GraphSignature, TensorSpec
from engines.weights import locate
from export.graphs import experts
from export.graphs.builder import Graph
from runtime.bench.cases import write
from scripts.experiments import report

WIDTH = 2048  # of the hidden states, in both shapes
SHAPES = {
    "LLaDA-MoE": ExpertsConfig(count=64, size=1024, per_row=8),
    "LLaDA2.0-mini": ExpertsConfig(
        count=256, size=512, per_row=8, sigmoid=True, groups=8, kept_groups=4, scale=2.5, shared=512
    ),
}
ROWS = 8, 32, 64, 256, 1024
MOST_OF_ALL = 64  # rows up to which all experts are timed: beyond, that is only slower
REPEATS = 5


@dataclass
class Mixture:
    """The weights of one mixture, in a file as a bundle has it and as PyTorch reads them."""

    config: ExpertsConfig
    file: Path

    @classmethod
    def make(cls, config: ExpertsConfig, file: Path) -> "Mixture":
        rng = np.random.default_rng(0)
        shapes = {
            "router.weight": (WIDTH, config.count), "experts.ff_proj.weight": (config.count, WIDTH, config.size),
            "experts.up_proj.weight": (config.count, WIDTH, config.size),
            "experts.ff_out.weight": (config.count, config.size, WIDTH),
        }  # fmt: skip
        if config.shared:
            shapes |= {f"shared.{name}.weight": (WIDTH, config.shared) for name in experts.NAMES[:2]}
            shapes["shared.ff_out.weight"] = config.shared, WIDTH
        if config.sigmoid:
            shapes["router.bias"] = (config.count,)
        chunk = rng.standard_normal(1 << 20).astype(np.float32) / np.float32(WIDTH**0.5)
        tensors = {name: np.resize(chunk, shape) for name, shape in shapes.items() if not name.startswith("router")}
        tensors |= {
            name: rng.standard_normal(shape).astype(np.float32) * np.float32(WIDTH**-0.5 if len(shape) > 1 else 0.01)
            for name, shape in shapes.items() if name.startswith("router")
        }  # fmt: skip
        save_file(tensors, file)
        return cls(config, file)

    def session(self, dialect: str) -> ort.InferenceSession:
        """The mixture as a graph for CPUs (touched) or GPUs (all), on one core."""
        hidden = TensorSpec("hidden", "fp32", ("B", "A", WIDTH))
        signature = GraphSignature("layer_00", (hidden,), (replace(hidden, name="out"),), dialect=dialect)
        graph = Graph(signature, "fp32", {"layer_00": (locate(self.file), self.file.name)})
        graph.op("Identity", experts.mixture(graph, self.config, "hidden", WIDTH), name="out")
        path = self.file.with_name(f"{self.file.stem}-{dialect}.onnx")
        path.write_bytes(graph.model().SerializeToString())
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def share(config: ExpertsConfig, weights: dict[str, torch.Tensor], hidden: np.ndarray) -> float:
    """The share of the experts that at least one row takes."""
    _, chosen = layers.route(config, weights, torch.from_numpy(hidden))
    return len(set(chosen.flatten().tolist())) / config.count


def milliseconds(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of each, interleaved."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS + 1):
        for name, work in ways.items():
            began = time.perf_counter()
            work()
            taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: round(statistics.median(all_of[1:]), 2) for name, all_of in taken.items()}


def measure(name: str, work: Path) -> dict[str, Any]:
    """The figures of one shape, by rows of a pass."""
    from safetensors.torch import load_file

    config = SHAPES[name]
    mixture = Mixture.make(config, work / f"{name}.safetensors")
    touched, every = mixture.session("cpu"), mixture.session("gpu")
    weights = load_file(mixture.file)
    expert_mb = 3 * WIDTH * config.size * 2 / 1e6  # in half precision
    rng, found = np.random.default_rng(1), {}
    for rows in ROWS:
        hidden = rng.standard_normal((1, rows, WIDTH)).astype(np.float32)
        part = share(config, weights, hidden)
        ways: dict[str, Callable[[], Any]] = {
            "touched": partial(touched.run, None, {"hidden": hidden}),
            "eager": partial(layers.experts, config, weights, torch.from_numpy(hidden)),
        }
        if rows <= MOST_OF_ALL:
            ways["all"] = partial(every.run, None, {"hidden": hidden})
        gap = np.abs(ways["touched"]()[0] - ways["all"]()[0]).max() if "all" in ways else None
        found[str(rows)] = {
            "share_touched": round(part, 4), "ms": milliseconds(ways), "largest_difference": gap and float(gap),
            "mb_read_touched": round(part * config.count * expert_mb, 1),
            "mb_read_all": round(config.count * expert_mb, 1),
        }  # fmt: skip
        print(name, rows, found[str(rows)], flush=True)
    return found


def main() -> int:
    options = report.parser(__doc__).parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    figures = report.resumed(options.out, {"shapes": {}})
    for name in SHAPES:
        if name not in figures["shapes"]:
            with torch.inference_mode():
                figures["shapes"][name] = measure(name, options.work)
        figures |= {"command": report.command(__file__), "versions": versions()}
        if options.out:
            write(figures, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
