"""Reduce the results of `python -m runtime eval --out RESULTS` to what the documents need.

    python scripts/experiments/summarize_eval.py RESULTS --against full --out docs/benchmarks/eval.json

RESULTS holds every token of every answer. The summary keeps, for each setting, the figures of `runtime eval` and per
problem whether the answer is correct, and for each setting against the reference policy the paired figures. Intervals
and tests can be computed from it again; agreement of tokens and times cannot.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from engines.cli import run
from runtime.bench.cases import write
from runtime.evaluation.exact_match import compare, entries, summary

TASK = ("checkpoint", "precision", "backend", "weights", "family", "few_shot", "gen_length")


Results = list[dict[str, Any]]


def collect(file: Path) -> list[tuple[dict[str, Any], Results]]:
    """All settings of a file of results: the key, and the results in order of the problems."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for entry in entries(file):
        found.setdefault(json.dumps(entry["key"]), {})[entry["result"]["number"]] = entry["result"]
    return [(json.loads(key), [by_number[n] for n in sorted(by_number)]) for key, by_number in found.items()]


def summarize(settings: list[tuple[dict[str, Any], Results]], against: str) -> dict[str, Any]:
    """The figures of every setting, and of each against the reference policy over all its families."""
    reference = {task_of(key): results for key, results in settings if key["policy"] == against}
    pairs: dict[str, list[tuple[Results, Results]]] = {}
    for key, results in settings:
        if key["policy"] != against and task_of(key) in reference:
            setting = json.dumps({name: value for name, value in key.items() if name != "family"})
            pairs.setdefault(setting, []).append((results, reference[task_of(key)]))
    return {
        "runs": [{"key": key, **summary(results), "correct_each": bits(results)} for key, results in settings],
        "paired": [
            {"setting": json.loads(setting), "against": against}
            | compare(*([result for pair in found for result in pair[side]] for side in (0, 1)))
            for setting, found in pairs.items()
        ],
    }


def task_of(key: dict[str, Any]) -> str:
    """What two settings must have in common to be compared."""
    return json.dumps([key[name] for name in TASK])


def bits(results: Results) -> str:
    """1 for each correct answer and 0 for each other one, in order of the problems."""
    return "".join(str(int(result["correct"])) for result in results)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path, help="file that `python -m runtime eval --out` wrote")
    parser.add_argument("--against", default="full", help="reference policy (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the summary to this file too")
    return run(summarize_command, parser.parse_args(), "interrupted")


def summarize_command(args: argparse.Namespace) -> None:
    found = summarize(collect(args.results), args.against)
    if args.out:
        write(found, args.out)
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
