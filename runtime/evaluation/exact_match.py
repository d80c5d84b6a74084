"""Exact match on held-out problems of a task family, resumable problem by problem.

With a results file every problem leaves one JSON line under a key of checkpoint,
back end, family, policy and options; a problem that has its line is not run again.
"""

import json
import os
import random
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from engines.errors import OptionError
from engines.options import values_of
from runtime.api import Runtime
from runtime.evaluation import tasks
from runtime.evaluation.intervals import agreement, paired, wilson

SEED = 20251014
STEPS = {"sums": (6, 12), "programs": (4, 8)}  # worked steps; prompts stay within 128 tokens
SHOT_STEPS = 2, 5  # of the solved problems in a few-shot prompt
LONGEST_PROMPT = 128
MOST = 100_000
PATIENCE = 100  # problems passed over for each that fits


def problems(model: Runtime, family: str, count: int) -> list[tasks.Problem]:
    """The first `count` held-out problems of a family whose prompts have at most 128 tokens."""
    rng = random.Random(f"{SEED}/{family}")
    drawn: list[tasks.Problem] = []
    passed_over = 0
    while len(drawn) < count:
        problem = tasks.generate(family, rng, "test", rng.randint(*STEPS[family]))
        if len(model.text.prompt(problem.prompt)) <= LONGEST_PROMPT:
            drawn.append(problem)
        else:
            passed_over += 1
        if passed_over > PATIENCE * (len(drawn) + 1):
            raise OptionError(
                f"this bundle's tokenizer hardly ever spells a problem of {family} in {LONGEST_PROMPT} tokens; "
                "choose another --task, or a bundle whose tokenizer has longer tokens"
            )
    return drawn


def evaluate(
    model: Runtime, family: str, limit: int, policy: str | None, options: dict[str, Any], file: Path | None,
    console: Console, few_shot: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run the first `limit` problems that have no result yet; all their results, in order.

    With `few_shot` each comes after as many solved ones as that many tokens hold.
    """
    if not 1 <= limit <= MOST:
        raise OptionError(f"limit must lie in 1 … {MOST:,} (problems are drawn before the first is asked), got {limit}")
    if few_shot < 0:
        raise OptionError(f"few-shot must be a number of tokens, or 0 for none, got {few_shot}")
    key = key_of(model, family, policy, options, few_shot)
    results = read(file, key)
    hidden = not console.is_terminal
    drawn = problems(model, family, limit)
    shots = random.Random(f"{SEED}/shots/{family}")
    for number, problem in enumerate(track(drawn, f"{family} {policy or ''}", console=console, disable=hidden)):
        asked = few_shot_prompt(model, problem, few_shot, shots) if few_shot else problem.prompt
        if number in results:
            continue
        out = model.generate(asked, policy, **options)
        results[number] = {
            "number": number, "correct": tasks.grade(out.text, problem), "steps": out.steps, "tokens": out.tokens,
            "seconds": out.seconds, "computed_fraction": out.computed_fraction, "ids": out.ids,
        }  # fmt: skip
        if file is not None:
            append(file, {"key": key, "result": results[number]})
    return [results[number] for number in range(limit)]


def few_shot_prompt(model: Runtime, problem: tasks.Problem, length: int, rng: random.Random) -> Any:
    """The prompt of a problem after as many solved ones as `length` tokens hold, as ids."""
    turns = [{"role": "user", "content": problem.prompt}]
    while True:
        shot = tasks.generate(problem.family, rng, "train", rng.randint(*SHOT_STEPS))
        said = [{"role": "user", "content": shot.prompt}, {"role": "assistant", "content": shot.solution}]
        if len(model.text.prompt([*said, *turns])) > length:
            return model.text.prompt(turns)
        turns = [*said, *turns]


def key_of(
    model: Runtime, family: str, policy: str | None, options: dict[str, Any], few_shot: int = 0
) -> dict[str, Any]:
    """What results hold for: the checkpoint and its engines, and every option of the policy, given or not."""
    manifest = model.bundle.manifest
    chosen, request = model.resolve(policy, options)
    return {
        "checkpoint": manifest.checkpoint["identity"][:16], "precision": manifest.precision,
        "backend": model.backend, "weights": manifest.engines.get(model.backend, {}).get("weights"),
        "family": family, "few_shot": few_shot, "policy": chosen.name, **values_of(chosen), **request,
    }  # fmt: skip


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Exact match with its 95 % interval, and means over the problems."""
    count = len(results)
    total = {
        name: sum(r[name] for r in results) for name in ("correct", "steps", "tokens", "seconds", "computed_fraction")
    }
    low, high = wilson(total["correct"], count)
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
    """The same problems two ways: exact match in pairs, and the mean share of equal tokens."""
    tokens = [agreement(a["ids"], b["ids"]) for a, b in zip(first, second, strict=True)]
    found = paired(*([bool(result["correct"]) for result in results] for results in (first, second)))
    return found.to_json() | {
        "agreement": sum(tokens) / len(tokens),
        "same_answers": sum(a["ids"] == b["ids"] for a, b in zip(first, second, strict=True)) / len(first),
        "times_faster": sum(b["seconds"] for b in second) / sum(a["seconds"] for a in first),
    }


def read(file: Path | None, key: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Results of earlier runs with the same key; a line cut short by an interruption is dropped."""
    found = {}
    if file is not None and file.exists():
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
            if isinstance(entry, dict) and entry.get("key") == key and "ids" in entry["result"]:
                found[entry["result"]["number"]] = entry["result"]
    return found


def append(file: Path, entry: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":  # a line cut short must not spoil the next
                    stream.write(b"\n")
            stream.write(json.dumps(entry).encode() + b"\n")
    except OSError as error:
        raise OptionError(f"cannot write results to {file} ({error.strerror}); choose another file") from error
