"""Accuracy and speed of `elastic` around its defaults, one option at a time; resumable.

    python scripts/experiments/sweep.py --work DIR [--out FILE] [--plot FILE] [--limit 100]    about 15 minutes

Builds the demo bundle with capacity for all values, runs the same problems of both families at every point (a point
that is in --out is not run again), and draws accuracy against tokens per second with the Pareto front, and refreshes
per step.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import export
import runtime
from engines.signatures.gpu import DRIFTS
from runtime.bench.cases import write
from runtime.bench.plots import figure, save
from runtime.evaluation import tasks
from runtime.evaluation.exact_match import problems
from runtime.evaluation.intervals import wilson
from scripts.experiments import report

DEFAULT: dict[str, Any] = {
    "threshold": 0.98, "gamma": 0.9, "window": 32, "track_num": 1, "drift": "row", "block_caching": True,
    "max_masks": 192, "refresh_scope": "all", "window_span": 16,
}  # fmt: skip
SWEEPS: dict[str, tuple[Any, ...]] = {
    "gamma": (0.5, 0.9, 0.95, 0.99, 0.999),
    "window": (4, 8, 16, 32, 64),
    "threshold": (0.6, 0.8, 0.9, 0.95, 0.98, 0.99),
    "window_span": (4, 8, 12, 16, 24, 32, None),
    "track_num": (1, 2, 4, 8),
    "drift": ("row", "head"),
    "block_caching": (True, False),
    "max_masks": (64, 128, 192, None),
    "refresh_scope": ("all", "near"),
}
# The drift tests are compared with a wider window, where more layers drift.
WIDE = DEFAULT | {"window_span": None}
DRIFT_GAMMAS = (0.9, 0.95, 0.98, 0.99, 0.999)


def points() -> list[dict[str, Any]]:
    """Every setting once: each option by itself, refresh scopes also at a high gamma, and the drift tests."""
    found = [DEFAULT | {name: value} for name, values in SWEEPS.items() for value in values]
    found += [WIDE | {"gamma": 0.99, "refresh_scope": scope} for scope in SWEEPS["refresh_scope"]]
    found += [WIDE | {"drift": kind, "gamma": gamma} for kind in DRIFTS for gamma in DRIFT_GAMMAS]
    return list({json.dumps(point): point for point in found}.values())


def run(model: runtime.Runtime, point: dict[str, Any], limit: int, gen_length: int) -> dict[str, Any]:
    """Run one point: totals over the problems of both families, exact match and its interval, and speed."""
    total = dict.fromkeys(("problems", "correct", "tokens", "seconds", "steps", "refreshes", "computed_fraction"), 0.0)
    most = point["max_masks"]
    options = point | {"max_masks": None if most is None else max(most, 2 * point["window"])}
    for family in tasks.FAMILIES:
        for problem in problems(model, family, limit):
            out = model.generate(problem.prompt, "elastic", gen_length=gen_length, **options)
            total["problems"] += 1
            total["correct"] += tasks.grade(out.text, problem)
            total["tokens"] += out.tokens
            total["seconds"] += out.seconds
            total["steps"] += out.steps
            total["refreshes"] += sum(event.refreshed for event in out.trace)
            total["computed_fraction"] += out.computed_fraction
    low, high = wilson(int(total["correct"]), int(total["problems"]))
    return {"options": point, **total, "exact_match": total["correct"] / total["problems"], "interval": [low, high],
            "tokens_per_second": total["tokens"] / total["seconds"]}  # fmt: skip


def plot(found: list[dict[str, Any]], file: Path) -> None:
    """Accuracy against speed of all points with the front, then accuracy and refreshes over each numeric option."""
    chart = figure(12, 4.2)
    left, middle, right = chart.subplots(1, 3)
    for name, values in SWEEPS.items():
        along = [point for value in values for point in found if point["options"] == DEFAULT | {name: value}]
        left.plot(
            [p["tokens_per_second"] for p in along], [100 * p["exact_match"] for p in along], "o", label=name, ms=4
        )
    default = next(point for point in found if point["options"] == DEFAULT)
    low, high = (100 * bound for bound in default["interval"])
    left.errorbar([default["tokens_per_second"]], [100 * default["exact_match"]],
                  yerr=[[100 * default["exact_match"] - low], [high - 100 * default["exact_match"]]],
                  fmt="k*", ms=12, capsize=4, label="default, 95 %")  # fmt: skip
    front = [p for p in found if not any(q["tokens_per_second"] > p["tokens_per_second"]
                                         and q["exact_match"] > p["exact_match"] for q in found)]  # fmt: skip
    front.sort(key=lambda p: float(p["tokens_per_second"]))
    left.plot([p["tokens_per_second"] for p in front], [100 * p["exact_match"] for p in front], "k:", lw=1)
    left.set(xlabel="tokens per second", ylabel="exact match, %", title="one option at a time (dotted: front)")
    left.legend(fontsize=7)
    for kind in DRIFTS:
        along = [p for g in DRIFT_GAMMAS for p in found if p["options"] == WIDE | {"drift": kind, "gamma": g}]
        rates = [p["refreshes"] / p["steps"] for p in along]
        middle.plot(DRIFT_GAMMAS, rates, marker="o", ms=4, label=kind)
        cost = [100 * p["computed_fraction"] / p["problems"] for p in along]
        right.plot(cost, [100 * p["exact_match"] for p in along], marker="o", ms=4, label=kind)
    middle.set(xlabel="gamma", ylabel="refreshes per step", title="drift tests")
    right.set(xlabel="% of layer-rows computed", ylabel="exact match, %", title="drift tests at equal cost")
    middle.legend(fontsize=7)
    right.legend(fontsize=7)
    save(chart, file)


def main() -> None:
    parser = report.parser(__doc__, limit=100)
    parser.add_argument("--gen-length", type=int, default=192, help="masks to fill (default: %(default)s)")
    args = parser.parse_args()
    found = report.resumed(args.out, {"points": []})["points"]
    done = {json.dumps(point["options"]) for point in found}
    with runtime.load(export.build("demo", args.work / "sweep", window=64, track_num=8), "onnxruntime") as model:
        about = report.about(__file__, [model], limit=args.limit, gen_length=args.gen_length)
        for point in points():
            if json.dumps(point) in done:
                continue
            found.append(run(model, point, args.limit, args.gen_length))
            if args.out:
                write(about | {"points": found}, args.out)
            right, speed = found[-1]["exact_match"], found[-1]["tokens_per_second"]
            print(
                f"[{len(found)}/{len(points())}] {right:.1%} {speed:.0f} tokens/s {point}", file=sys.stderr, flush=True
            )
    report.finish(about | {"points": found}, args, lambda file: plot(found, file))


if __name__ == "__main__":
    main()
