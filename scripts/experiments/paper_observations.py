"""The three observations that Elastic-Cache rests on (arXiv 2510.14973, section 3), checked on the demo model.

    python scripts/experiments/paper_observations.py --work DIR [--out FILE] [--plot FILE] [--limit 40]

Every step is computed in full, in eager PyTorch, and commits as `elastic` does.
(1) How much attention of the window's rows goes to masks beyond it, by distance.
(2) How much keys and values drift from one step to the next, by layer.
(3) Whether the most-attended token's keys drift less than those of all other tokens.
Drift is 1 minus the cosine, over tokens that were known before both steps.
"""

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import export
import runtime
from engines.eager.layers import attention_rows
from runtime.bench.plots import figure, save
from runtime.decoding.sampler import choose
from runtime.decoding.sequence import Sequence
from runtime.evaluation import tasks
from scripts.experiments import report

WINDOW, THRESHOLD, GEN_LENGTH = 16, 0.98, 192
BINS = 12  # of distance, in the plot
FAR = GEN_LENGTH - WINDOW


def observe(model: Any, prompt: NDArray[np.int64], seen: dict[str, list[Any]]) -> None:
    """Decode one prompt with a full pass per step, and append what the three observations need to `seen`."""
    config = model.config
    sequence = Sequence.start(prompt, GEN_LENGTH, config.mask_id, config.end_ids)
    runner = model.new_runner(len(sequence))
    before: dict[str, torch.Tensor] = {}
    known_before = np.zeros(0, np.int64)  # tokens known before the last step
    while not sequence.done:
        known = np.flatnonzero(sequence.ids != sequence.mask_id)
        window = sequence.open[:WINDOW]
        far = sequence.masked[sequence.masked > window[-1]]
        runner.embed(sequence.ids)
        runner.run_layers(len(sequence), None)
        for layer in range(config.layers):
            rows = attention_rows(runner.q[layer][:, window], runner.k[layer], runner.key_mask)[0]  # [H, W, S]
            mass = rows.sum((0, 1)).numpy()
            for position in far:
                seen["attention"].append((layer, int(position - window[-1]), mass[position] / mass.sum()))
            best = int(known[mass[known].argmax()])
            for name, cache in (("k", runner.k[layer, 0]), ("v", runner.v[layer, 0])):
                key = f"{name}{layer}"
                if key in before:
                    now, old = cache[:, known_before], before[key][:, known_before]
                    drift = 1 - torch.cosine_similarity(now, old, dim=-1).mean(0).numpy()
                    seen[name].append((layer, float(drift.mean())))
                    if name == "k" and best in known_before:
                        at = int(np.flatnonzero(known_before == best)[0])
                        others = np.delete(drift, at)
                        seen["most_attended"].append(
                            (layer, float(drift[at]), float(others.mean()), float((others > drift[at]).mean()))
                        )
                before[key] = cache.clone()
        known_before = known
        token, confidence = runner.head(window)
        taken = choose(confidence, THRESHOLD, None)
        sequence.commit(window[taken], token[taken])


def summary(seen: dict[str, list[Any]], layers: int) -> dict[str, Any]:
    """Means by layer: attention by distance, drift of keys and values, the most-attended token against the others."""
    attention = np.array(seen["attention"])
    edges = np.linspace(0, FAR, BINS + 1)
    bins = np.digitize(attention[:, 1], edges) - 1
    by_distance = [
        [float(attention[(attention[:, 0] == layer) & (bins == b), 2].mean()) for b in range(BINS)]
        for layer in range(layers)
    ]  # fmt: skip

    def by_layer(name: str, column: int) -> list[float]:
        rows = np.array(seen[name])
        return [float(rows[rows[:, 0] == layer, column].mean()) for layer in range(layers)]

    return {
        "distance_edges": edges.tolist(), "attention_a_far_mask": by_distance,
        "key_drift": by_layer("k", 1), "value_drift": by_layer("v", 1),
        "most_attended_drift": by_layer("most_attended", 1), "other_drift": by_layer("most_attended", 2),
        "others_that_drift_more": by_layer("most_attended", 3),
    }  # fmt: skip


def plot(found: dict[str, Any], file: Path) -> None:
    """Draw one panel per observation."""
    chart = figure(12, 3.6)
    left, middle, right = chart.subplots(1, 3)
    edges = np.array(found["distance_edges"])
    for layer, masses in enumerate(found["attention_a_far_mask"]):
        left.semilogy((edges[1:] + edges[:-1]) / 2, masses, marker=".", label=f"layer {layer}")
    left.set(xlabel="distance beyond the window", ylabel="fraction of attention", title="(1) one far mask")
    left.legend(fontsize=7, ncols=2)
    layers = np.arange(len(found["key_drift"]))
    middle.plot(layers, found["key_drift"], marker="o", label="keys")
    middle.plot(layers, found["value_drift"], marker="o", label="values")
    middle.set(xlabel="layer", ylabel="1 - cosine, a step", title="(2) drift of known tokens")
    middle.legend(fontsize=8)
    right.plot(layers, found["most_attended_drift"], marker="o", label="most attended token")
    right.plot(layers, found["other_drift"], marker="o", label="mean of the others")
    right.set(xlabel="layer", ylabel="1 - cosine of keys, a step", title="(3) the most-attended token")
    right.legend(fontsize=8)
    save(chart, file)


def main() -> None:
    args = report.parser(__doc__, limit=40).parse_args()
    seen: dict[str, list[Any]] = {"attention": [], "k": [], "v": [], "most_attended": []}
    with runtime.load(export.build("demo", args.work / "observed"), "eager") as model:
        for problem in tasks.in_turn(random.Random(0), "test", args.limit):
            observe(model.model, model.text.prompt(problem.prompt), seen)
        about = report.about(__file__, [model], limit=args.limit)
        found = about | summary(seen, model.bundle.config.layers)
    report.finish(found, args, lambda file: plot(found, file))


if __name__ == "__main__":
    main()
