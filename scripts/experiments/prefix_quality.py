"""What reused prefixes cost in exact match, and what they save: the same problems with and without the cache.

    python scripts/experiments/prefix_quality.py --work DIR [--limit 2000] [--out FILE]

Each family has one fixed few-shot prefix of chat turns, of about 128, 500 and 900 tokens, and its held-out problems
behind. The demo model decodes them with `elastic` and its defaults, the cache on and off, problem by problem in
turn, on one thread of ONNX Runtime. Answers are kept in --work, so that a run goes on where it stopped; times are those
of the steps, the state kept already. 2,000 problems of each family take over an hour on one core.
"""

import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import export
import runtime
from runtime.evaluation import intervals, tasks
from runtime.evaluation.exact_match import SHOT_STEPS, append, problems
from scripts.experiments import report

PREFIXES = {500: 256, 128: 256, 900: 192}  # tokens of a prefix -> gen_length
SEED = 20261128


def shots(model: runtime.Runtime, family: str, length: int) -> list[dict[str, str]]:
    """Solved problems as chat turns, as many as have `length` tokens."""
    rng, turns = random.Random(f"{SEED}/{family}"), list[dict[str, str]]()
    while True:
        shot = tasks.generate(family, rng, "train", rng.randint(*SHOT_STEPS))
        longer = [*turns, {"role": "user", "content": shot.prompt}, {"role": "assistant", "content": shot.solution}]
        if len(model.text.prompt([*longer, {"role": "user", "content": "x"}])) > length and turns:
            return turns
        turns = longer


def answered(models: dict[str, runtime.Runtime], family: str, length: int, limit: int, work: Path) -> list[Any]:
    """For each problem the results with the cache `on` and `off`."""
    file = work / f"prefix-{family}-{length}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    done = [json.loads(line)["result"] for line in lines]
    turns = shots(models["off"], family, length)
    for number, problem in enumerate(problems(models["off"], family, limit)):
        if number < len(done):
            continue
        found = {}
        for name in ("on", "off") if number % 2 else ("off", "on"):
            prompt = [*turns, {"role": "user", "content": problem.prompt}]
            out = models[name].generate(prompt, "elastic", gen_length=PREFIXES[length])
            found[name] = {
                "correct": tasks.grade(out.text, problem), "ids": out.ids, "seconds": out.seconds,
                "prefix": out.prefix_rows, "refreshes": sum(event.refreshed for event in out.trace),
            }  # fmt: skip
        done.append(found)
        append(file, {"key": {}, "result": found})
    return done[:limit]


def figures(results: list[Any]) -> dict[str, Any]:
    """Paired exact match, the share of equal answers, and how many times faster."""
    on, off = ([one[name] for one in results] for name in ("on", "off"))
    paired = intervals.paired([r["correct"] for r in on], [r["correct"] for r in off]).to_json()
    return paired | {
        "exact_match_on": statistics.fmean(r["correct"] for r in on),
        "exact_match_off": statistics.fmean(r["correct"] for r in off),
        "same_answers": statistics.fmean(a["ids"] == b["ids"] for a, b in zip(on, off, strict=True)),
        "prefix_rows": on[0]["prefix"], "refreshes": statistics.fmean(r["refreshes"] for r in on),
        "times_faster": statistics.median(b["seconds"] / a["seconds"] for a, b in zip(on, off, strict=True)),
    }  # fmt: skip


def main() -> None:
    args = report.parser(__doc__, 2000).parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    bundle = export.build("demo", args.work / "demo", backends=["onnxruntime"])
    models = {
        "on": runtime.load(bundle, "onnxruntime", 1 << 30, threads=1),
        "off": runtime.load(bundle, "onnxruntime", threads=1),
    }
    found: dict[str, Any] = {}
    for length in PREFIXES:
        every = []
        for family in tasks.FAMILIES:
            results = answered(models, family, length, args.limit, args.work)
            found[f"{family}, {length}"] = figures(results)
            every += results
            print(family, length, found[f"{family}, {length}"], flush=True)
        found[f"both, {length}"] = figures(every)
        report.finish({"prefixes": found} | report.about(__file__, [*models.values()], limit=args.limit), args)


if __name__ == "__main__":
    main()
