"""Exact match on held-out problems of a task family, resumable problem by problem.

With a results file every problem leaves one JSON line under a key of bundle,
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
from runtime import tasks
from runtime.api import Runtime

SEED = 20251014
STEPS = {"sums": (6, 12), "programs": (4, 8)}  # worked steps; prompts stay within 128 tokens
LONGEST_PROMPT = 128
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
    console: Console,
) -> dict[str, Any]:  # fmt: skip
    """Run the problems that have no result yet; returns exact match, steps, tokens and tokens/s."""
    if limit < 1:
        raise OptionError(f"limit must be at least 1, got {limit}")
    given = {name: value for name, value in options.items() if value is not None}
    key = {"bundle": model.bundle.identity, "backend": model.backend, "family": family, "policy": policy, **given}
    results = read(file, key)
    hidden = not console.is_terminal
    drawn = problems(model, family, limit)
    for number, problem in enumerate(track(drawn, f"{family} {policy or ''}", console=console, disable=hidden)):
        if number in results:
            continue
        out = model.generate(problem.prompt, policy, **options)
        results[number] = {
            "number": number, "correct": tasks.grade(out.text, problem), "steps": out.steps, "tokens": out.tokens,
            "seconds": out.seconds, "share": out.share,
        }  # fmt: skip
        if file is not None:
            append(file, {"key": key, "result": results[number]})
    kept = [results[number] for number in range(limit)]
    total = {name: sum(r[name] for r in kept) for name in ("correct", "steps", "tokens", "seconds", "share")}
    return key | {
        "problems": limit,
        "exact_match": total["correct"] / limit,
        "steps": total["steps"] / limit,
        "tokens": total["tokens"] / limit,
        "tokens_per_second": total["tokens"] / total["seconds"],
        "share": total["share"] / limit,
    }


def read(file: Path | None, key: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Results of earlier runs with the same key; a line cut short by an interruption is dropped."""
    found = {}
    if file is not None and file.exists():
        try:
            lines = file.read_text().splitlines()
        except (OSError, UnicodeError) as error:
            raise OptionError(f"cannot read results from {file} ({error}); choose another file") from error
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and entry.get("key") == key:
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
