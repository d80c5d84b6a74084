"""What gamma, the start of a refresh and the number of tracked tokens do where fixed tokens change their meaning.

    python scripts/experiments/study_puzzles.py --work DIR [--limit 500] [--out FILE] [--plot FILE]

The checkpoints `sudoku` and `vote`, one commit a step with all holes in the window, on ONNX Runtime with one thread:
exact match and layer-rows computed, paired with `full`. Resumable: answers are kept in --work. With 500 puzzles about
ten minutes on one core.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import export
import runtime
from runtime.bench.plots import figure, save
from runtime.evaluation.exact_match import compare, evaluate, summary
from runtime.evaluation.puzzles import FAMILIES
from scripts.experiments import report

WINDOW, TRACKED = 32, 8  # of the bundles
GAMMAS = 0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99
STEP: dict[str, Any] = {
    "threshold": None,
    "tokens_per_step": 1,
    "window": WINDOW,
    "max_masks": None,
    "window_span": None,
}


def settings() -> list[dict[str, Any]]:
    """Every gamma with both starts of a refresh; more tracked tokens without a refresh, and with either start."""
    found: list[dict[str, Any]] = [{"gamma": gamma, "refresh_start": "next"} for gamma in GAMMAS]
    found += [{"gamma": gamma, "refresh_start": "first"} for gamma in GAMMAS if gamma]
    found += [{"gamma": gamma, "track_num": count} for gamma in (0.0, 0.9) for count in (2, 4, 8)]
    return found + [
        {"gamma": gamma, "refresh_start": "first", "track_num": count} for gamma in (0.5, 0.7) for count in (2, 4, 8)
    ]


def study(model: runtime.Runtime, family: str, limit: int, work: Path) -> list[dict[str, Any]]:
    """The figures of `full`, then of each setting of `elastic`, on the same puzzles."""
    file = work / f"{family}.jsonl"
    whole = evaluate(model, family, limit, "full", {"block_length": model.bundle.capacity.max_length}, file)
    found: list[dict[str, Any]] = [{"policy": "full"} | figures_of(whole) | {"by_holes": by_holes(whole)}]
    for given in settings():
        results = evaluate(model, family, limit, "elastic", STEP | given, file)
        paired = compare(results, whole)
        found.append(
            {"policy": "elastic"} | given | figures_of(results)
            | {name: paired[name] for name in ("difference", "low", "high", "same_answers")}
        )  # fmt: skip
        print(family, given, f"{found[-1]['exact_match']:.1%}", f"{found[-1]['computed_fraction']:.1%}", flush=True)
    return found


def figures_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Those of `summary` but the speed: nothing else runs in turn with it."""
    return {name: value for name, value in summary(results).items() if name != "tokens_per_second"}


def by_holes(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Exact match of the puzzles with up to 20 holes, and of those with more."""
    kept = {"to 20": [r for r in results if r["tokens"] <= 20], "more": [r for r in results if r["tokens"] > 20]}
    return {
        name: {"puzzles": len(some), "exact_match": sum(r["correct"] for r in some) / len(some)}
        for name, some in kept.items() if some
    }  # fmt: skip


def draw(figures: dict[str, Any], file: Path) -> None:
    """Exact match over layer-rows computed, a line for each start of a refresh and one for more tracked tokens."""
    chart = figure(11, 4.5)
    for axes, family in zip(chart.subplots(1, 2), figures["families"], strict=True):
        rows = figures["families"][family]
        lines = {
            "refresh from the next layer": [row for row in rows if row.get("refresh_start") == "next"],
            "refresh from the first layer": [
                row for row in rows if row.get("refresh_start") == "first" and "track_num" not in row
            ],
            "gamma 0, more tracked tokens": [row for row in rows if "track_num" in row and row["gamma"] == 0],
            "first layer, gamma 0.5, more tracked": [
                row for row in rows if "track_num" in row and "refresh_start" in row and row["gamma"] == 0.5
            ],
        }
        for label, kept in lines.items():
            axes.plot(
                [100 * r["computed_fraction"] for r in kept], [100 * r["exact_match"] for r in kept], "o-", label=label
            )
        axes.axhline(100 * rows[0]["exact_match"], color="gray", linestyle=":", label="full")
        axes.set(title=family, xlabel="layer-rows computed, %", ylabel="exact match, %", ylim=(0, 102), xlim=(0, 102))
        axes.legend(fontsize=8)
    save(chart, file)


def main() -> None:
    args = report.parser(__doc__, 500).parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"families": {}}
    models = []
    for family in FAMILIES:
        bundle = export.build(
            family, args.work / family, backends=["onnxruntime"], window=WINDOW, track_num=TRACKED, max_length=128
        )
        with runtime.load(bundle, "onnxruntime", threads=1) as model:
            figures["families"][family] = study(model, family, args.limit, args.work)
            models.append(model)
    figures |= report.about(__file__, models, limit=args.limit)
    report.finish(figures, args, lambda file: draw(figures, file))


if __name__ == "__main__":
    main()
