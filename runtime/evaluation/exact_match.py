"""Exact match on held-out problems of a task family, resumable problem by problem.

A results file holds one JSON line for each problem: its result, and a key of checkpoint, back end, family, policy and
options. A problem whose line is in the file is not run again.
"""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from engines.errors import OptionError
from engines.files import writing
from engines.options import values_of
from runtime.api import Runtime
from runtime.evaluation import intervals, tasks
from runtime.evaluation.intervals import agreement
from runtime.evaluation.tasks import STEPS

SEED = 20251014
SHOT_STEPS = 2, 5  # least and most worked steps of the solved problems in a few-shot prompt
LONGEST_PROMPT = 128  # tokens
MOST = 100_000  # problems
PATIENCE = 100  # problems that may be skipped for each one that fits


def problems(model: Runtime, family: str, count: int) -> list[tasks.Problem]:
    """Draw the first `count` held-out problems of a family whose prompts have at most 128 tokens.

    Raises OptionError if the tokenizer fits fewer than one problem in 100.
    """
    rng = random.Random(f"{SEED}/{family}")
    drawn: list[tasks.Problem] = []
    skipped = 0
    while len(drawn) < count:
        problem = tasks.generate(family, rng, "test", rng.randint(*STEPS[family]))
        if len(model.text.prompt(problem.prompt)) <= LONGEST_PROMPT:
            drawn.append(problem)
        else:
            skipped += 1
        if skipped > PATIENCE * (len(drawn) + 1):
            raise OptionError(
                f"the bundle's tokenizer needs more than {LONGEST_PROMPT} tokens for almost every problem of {family}; "
                "choose another --task, or a bundle whose tokenizer has longer tokens"
            )
    return drawn


def evaluate(
    model: Runtime, family: str, limit: int, policy: str | None, options: dict[str, Any], file: Path | None,
    console: Console, few_shot: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run those of the first `limit` problems that have no result yet; return all results, in order.

    With `few_shot`, a prompt is filled up to that many tokens with solved problems. Raises OptionError for numbers out
    of range, a file that cannot be read or written, and without the library that `summary` needs.
    """
    intervals.require()
    if not 1 <= limit <= MOST:
        raise OptionError(f"limit must lie in 1 … {MOST:,} (all problems are drawn before the first run), got {limit}")
    if few_shot < 0:
        raise OptionError(f"few-shot must be a number of tokens, or 0 for none, got {few_shot}")
    key = key_of(model, family, policy, options, few_shot)
    results = read(file, key)
    hidden = not console.is_terminal
    drawn = problems(model, family, limit)
    shots = random.Random(f"{SEED}/shots/{family}")
    for number, problem in enumerate(track(drawn, f"{family} {policy or ''}", console=console, disable=hidden)):
        prompt = few_shot_prompt(model, problem, few_shot, shots) if few_shot else problem.prompt
        if number in results:
            continue
        out = model.generate(prompt, policy, **options)
        results[number] = {
            "number": number, "correct": tasks.grade(out.text, problem), "steps": out.steps, "tokens": out.tokens,
            "seconds": out.seconds, "computed_fraction": out.computed_fraction, "ids": out.ids,
        }  # fmt: skip
        if file is not None:
            append(file, {"key": key, "result": results[number]})
    return [results[number] for number in range(limit)]


def few_shot_prompt(model: Runtime, problem: tasks.Problem, length: int, rng: random.Random) -> Any:
    """The ids [P] of a problem's prompt, after as many solved problems as fit into `length` tokens."""
    turns = [{"role": "user", "content": problem.prompt}]
    while True:
        shot = tasks.generate(problem.family, rng, "train", rng.randint(*SHOT_STEPS))
        solved = [{"role": "user", "content": shot.prompt}, {"role": "assistant", "content": shot.solution}]
        if len(model.text.prompt([*solved, *turns])) > length:
            return model.text.prompt(turns)
        turns = [*solved, *turns]


def key_of(
    model: Runtime, family: str, policy: str | None, options: dict[str, Any], few_shot: int = 0
) -> dict[str, Any]:
    """What a result depends on: checkpoint, engines, kind of problem, and all options with their defaults."""
    manifest = model.bundle.manifest
    chosen, request = model.resolve(policy, options)
    return {
        "checkpoint": manifest.checkpoint["identity"][:16], "precision": manifest.precision,
        "backend": model.backend, "weights": manifest.engines.get(model.backend, {}).get("weights"),
        "family": family, "few_shot": few_shot, "policy": chosen.name, **values_of(chosen), **request,
    }  # fmt: skip


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Exact match with its 95 % interval, tokens per second, and means over the problems."""
    count = len(results)
    total = {
        name: sum(r[name] for r in results) for name in ("correct", "steps", "tokens", "seconds", "computed_fraction")
    }
    low, high = intervals.wilson(total["correct"], count)
    return {
        "problems": count,
        "exact_match": total["correct"] / count,
        "interval": [low, high],
        "steps": total["steps"] / count,
        "tokens": total["tokens"] / count,
        "tokens_per_second": total["tokens"] / total["seconds"],
        "computed_fraction": total["computed_fraction"] / count,
    }


def compare(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, Any]:
    """Two settings on the same problems: exact match in pairs, the mean agreement of tokens, and the speed-up."""
    tokens = [agreement(a["ids"], b["ids"]) for a, b in zip(first, second, strict=True)]
    found = intervals.paired(*([bool(result["correct"]) for result in results] for results in (first, second)))
    return found.to_json() | {
        "agreement": sum(tokens) / len(tokens),
        "same_answers": sum(a["ids"] == b["ids"] for a, b in zip(first, second, strict=True)) / len(first),
        "times_faster": sum(b["seconds"] for b in second) / sum(a["seconds"] for a in first),
    }


def read(file: Path | None, key: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Results of earlier runs with the same key, by number of the problem."""
    if file is None or not file.exists():
        return {}
    return {e["result"]["number"]: e["result"] for e in entries(file) if e["key"] == key and "ids" in e["result"]}


def entries(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a results file; a line that an interruption cut short is skipped.

    Raises OptionError if the file cannot be read or holds something else.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeError) as error:
        raise OptionError(f"cannot read results from {file} ({error}); choose another file") from error
    if lines and not any(line.startswith('{"key"') for line in lines):
        raise OptionError(f"{file} holds something else than results; choose another --json")
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.keys() >= {"key", "result"}:
            yield entry


def append(file: Path, entry: dict[str, Any]) -> None:
    """Add one line to a results file."""
    with writing(file, "choose another --json"):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":  # the last line was cut short
                    stream.write(b"\n")
            stream.write(json.dumps(entry).encode() + b"\n")
