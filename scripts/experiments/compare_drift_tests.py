"""Compare drift tests: the sigma of each against the error that the cache really causes at that step.

    python scripts/experiments/compare_drift_tests.py --work DIR [--out FILE] [--plot FILE] [--limit 60]

Few-shot problems are decoded in eager PyTorch with gamma 0, so that nothing is refreshed, and every drift test is
computed at every step. The error of a step is the total variation distance between the window's token distributions
and those of a plain forward over the same ids. A good drift test ranks the steps as their errors do.
"""

import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import export
import runtime
from engines.eager.layers import attention_before_and_after
from engines.eager.model import EagerModel, EagerRunner
from engines.runner import DriftInputs, ReuseResult
from runtime.bench.plots import figure, save
from runtime.decoding.controller import Controller
from runtime.decoding.events import StepEvent
from runtime.decoding.generate import stream
from runtime.decoding.policies import Elastic
from runtime.decoding.request import Request
from runtime.evaluation import tasks
from runtime.evaluation.exact_match import few_shot_prompt
from scripts.experiments import report

POLICY: Any = Elastic(window=32, threshold=0.9, gamma=0.0)
GEN_LENGTH, FEW_SHOT = 192, 400
WORST = 0.1  # fraction of steps, those of largest error, that a drift test should find


def lowest(old: Tensor, new: Tensor) -> Tensor:
    """`min`: the cosine over the keys, averaged over heads, of the token for which it is lowest."""
    return F.cosine_similarity(old, new, dim=-1).mean(1).amin(1)


def focus(old: Tensor, new: Tensor) -> Tensor:
    """The cosine over the keys, weighted by each row's Kullback-Leibler divergence from uniform attention, in nats."""
    entropy = -(new * new.clamp_min(1e-30).log()).sum(-1)
    weights = (math.log(new.shape[-1]) - entropy).clamp_min(1e-6)
    return (F.cosine_similarity(old, new, dim=-1) * weights).sum((1, 2)) / weights.sum((1, 2))


def moved(old: Tensor, new: Tensor) -> Tensor:
    """1 minus the total variation distance of the attention rows before and after."""
    return (1 - (old - new).abs().sum(-1) / 2).mean((1, 2))


# Drift test: attention rows [1, H, T, S] before and after a pass -> sigma [1]. The last three are not exported.
CANDIDATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "row": lambda old, new: F.cosine_similarity(old, new, dim=-1).mean((1, 2)),
    "head": lambda old, new: F.cosine_similarity(old, new, dim=1).mean((1, 2)),
    "min": lowest, "focus": focus, "moved": moved,
}  # fmt: skip


class RecordingRunner(EagerRunner):
    """A runner that computes every drift test at every layer and never triggers."""

    @torch.inference_mode()
    def reuse(self, rows: int, drift_inputs: DriftInputs, gamma: float) -> ReuseResult:
        """Run the first `rows` slots through all layers and record sigma of every drift test."""
        self.sigma = {kind: list[float]() for kind in CANDIDATES}
        probes = []
        for index in range(self.config.layers):
            q_prev, k_prev = self.save_previous(index, rows, drift_inputs)
            self.layer(index, rows)
            q_now = self.q[index][:, self.indices(drift_inputs.tracked)]
            old, new = attention_before_and_after(q_prev, q_now, k_prev, self.k[index], self.key_mask)
            real = self.key_mask[0]  # [S]: slots that hold a position
            for kind, similarity in CANDIDATES.items():
                self.sigma[kind].append(float(similarity(old[..., real], new[..., real])))
            probes.append(self.probe(index, drift_inputs))
        return ReuseResult(self.sigma["row"], None, probes)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities [W, V] of logits [W, V], in float64."""
    wide = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return np.asarray(wide / wide.sum(-1, keepdims=True))


def observe(model: EagerModel, prompt: NDArray[np.int64]) -> list[dict[str, float]]:
    """The lowest sigma of every drift test and the error, for each step of one prompt after the first."""
    made: list[Controller] = []

    def make(runner: Any, *rest: Any) -> Controller:
        made.append(Controller(RecordingRunner(model, runner.length, runner.length), *rest))
        return made[0]

    ids = np.concatenate([prompt, np.full(GEN_LENGTH, model.config.mask_id)])
    found = []
    for event in stream(model, Request(prompt, gen_length=GEN_LENGTH), POLICY, None, make):
        if not isinstance(event, StepEvent):
            break
        if event.step:
            runner = made[0].runner
            assert isinstance(runner, RecordingRunner)
            window = np.array(event.window)
            truth = model.new_runner(len(ids))
            truth.embed(ids)
            truth.run_layers(len(ids), None)
            cached, fresh = runner.logits(made[0].map.slot_of[window]), truth.logits(window)
            error = np.abs(softmax(cached) - softmax(fresh)).sum(-1).mean() / 2
            found.append({kind: min(sigma) for kind, sigma in runner.sigma.items()} | {"error": float(error)})
        ids[event.committed] = event.tokens
    return found


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rank of each value, 0 for the smallest."""
    return np.argsort(np.argsort(values)).astype(np.float64)


def summary(steps: list[dict[str, float]]) -> dict[str, Any]:
    """For each drift test: rank correlation with the error, and the steps to refresh until the worst are caught."""
    error = np.array([step["error"] for step in steps])
    worst = error >= np.quantile(error, 1 - WORST)
    found: dict[str, Any] = {"steps": len(steps), "mean_error": float(error.mean()), "worst": float(error[worst].min())}
    for kind in CANDIDATES:
        drift = 1 - np.array([step[kind] for step in steps])
        order = np.argsort(-drift)
        caught = np.cumsum(worst[order]) / worst.sum()
        found[kind] = {
            "spearman": float(np.corrcoef(ranks(drift), ranks(error))[0, 1]),
            "worst_caught_at_20_percent": float(caught[int(0.2 * len(steps))]),
            "refreshes_to_catch_90_percent": float((np.flatnonzero(caught >= 0.9)[0] + 1) / len(steps)),
        }
    return found


def plot(steps: list[dict[str, float]], file: Path) -> None:
    """Draw the error of every step over 1 - sigma, one panel per drift test."""
    chart = figure(12, 3.2)
    error = [step["error"] for step in steps]
    for axes, kind in zip(chart.subplots(1, len(CANDIDATES), sharey=True), CANDIDATES, strict=True):
        axes.loglog([max(1e-6, 1 - step[kind]) for step in steps], np.maximum(error, 1e-6), ".", ms=3, alpha=0.5)
        axes.set(xlabel="1 - sigma", title=kind)
    chart.axes[0].set_ylabel("error of the step")
    save(chart, file)


def main() -> None:
    args = report.parser(__doc__, limit=60).parse_args()
    rng, steps = random.Random(1), list[dict[str, float]]()
    with runtime.load(export.build("demo", args.work / "observed"), "eager") as model:
        assert isinstance(model.model, EagerModel)
        for problem in tasks.in_turn(rng, "test", args.limit):
            steps += observe(model.model, few_shot_prompt(model, problem, FEW_SHOT, rng))
        about = report.about(__file__, [model], limit=args.limit)
    report.finish(about | summary(steps), args, lambda file: plot(steps, file))


if __name__ == "__main__":
    main()
