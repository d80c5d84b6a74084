"""Exact match on held-out problems of a task family, resumable problem by problem.

A results file holds one JSON line for each problem: its result, and a key of checkpoint, back end, family, policy and
options. A problem whose line is in the file is not run again.
"""

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from engines.errors import OptionError
from engines.files import writing
from engines.options import values_of, within
from runtime.api import Runtime
from runtime.evaluation import in_place, intervals, puzzles, tasks
from runtime.evaluation.intervals import agreement
from runtime.evaluation.tasks import STEPS
from runtime.outputs import ANY, check_output

SEED = 20251014
SHOT_STEPS = 2, 5  # least and most worked steps of the solved problems in a few-shot prompt
LONGEST_PROMPT = 128  # tokens
MOST = 100_000  # problems
PATIENCE = 100  # problems that may be skipped for each one that fits


def problems(model: Runtime, family: str, count: int, longest: int = LONGEST_PROMPT) -> list[tasks.Problem]:
    """Draw the first `count` held-out problems of a family whose prompts have at most `longest` tokens, or 128.

    Raises OptionError as `fitting` does.
    """
    rng = random.Random(f"{SEED}/{family}")
    drawn = iter(lambda: tasks.generate(family, rng, "test", rng.randint(*STEPS[family])), None)
    return list(islice(fitting(model, drawn, min(longest, LONGEST_PROMPT)), count))


def fitting(model: Runtime, drawn: Iterable[tasks.Problem], longest: int) -> Iterator[tasks.Problem]:
    """Those problems whose prompts have at most `longest` tokens.

    Raises OptionError if fewer than about one in 100 has.
    """
    fit = skipped = 0
    for problem in drawn:
        if len(model.text.prompt(problem.prompt)) <= longest:
            fit += 1
            yield problem
        else:
            skipped += 1
        if skipped > PATIENCE * (fit + 1):
            remedy = "choose another --task" if longest == LONGEST_PROMPT else "give a smaller --gen-length"
            raise OptionError(
                f"the bundle's tokenizer needs more than {longest} tokens for almost every problem of "
                f"{problem.family}; {remedy}, or another bundle"
            )


def room(model: Runtime, gen_length: int) -> int:
    """The tokens that a prompt may have beside `gen_length` masks; raises OptionError for none."""
    length = model.bundle.capacity.max_length
    within("gen_length", gen_length, 1, length - 1, "the bundle's length, less a prompt")
    return length - gen_length


def check(limit: int, few_shot: int, file: Path | None) -> None:
    """Check what an evaluation needs before a model is loaded; raises OptionError as `evaluate` does."""
    intervals.require()
    within("limit", limit, 1, MOST, "all problems are drawn before the first run")
    if few_shot < 0:
        raise OptionError(f"few_shot must be a number of tokens, or 0 for none, got {few_shot}")
    check_output(file, ANY, "choose another --out")
    if file is not None and file.exists():
        any(entries(file))


def evaluate(
    model: Runtime, family: str, limit: int, policy: str | None, options: dict[str, Any], file: Path | None = None,
    few_shot: int = 0, done: Callable[[int], None] = lambda number: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run those of the first `limit` problems that have no result yet; return all results, in order.

    With `few_shot`, a prompt is filled up to that many tokens with solved problems. `done` is called with the number
    of finished problems. Raises OptionError for numbers out of range, options with which no problem can be decoded, a
    file that cannot be read or written, and without the library that `summary` needs.
    """
    check(limit, few_shot, file)
    if family in puzzles.FAMILIES:
        options = {name: value for name, value in options.items() if name != "gen_length"}
        runs = in_place.runs(model, family, limit, policy, options, few_shot)
    else:
        runs = answers(model, family, limit, policy, options, few_shot)
    key = key_of(model, family, policy, options, few_shot)
    results = read(file, key)
    for number, run in enumerate(runs):
        if number not in results:
            results[number] = {"number": number} | run()
            if file is not None:
                append(file, {"key": key, "result": results[number]})
        done(number + 1)
    return [results[number] for number in range(limit)]


def answers(
    model: Runtime, family: str, limit: int, policy: str | None, options: dict[str, Any], few_shot: int
) -> Iterator[Callable[[], dict[str, Any]]]:
    """For each problem a function that answers it and returns the result; raises as `evaluate`."""
    longest = room(model, model.check_options(policy, options).gen_length)
    within("few_shot", few_shot, 0, longest, "the bundle's length, less gen_length")
    shots = random.Random(f"{SEED}/shots/{family}")

    def answer(problem: tasks.Problem, prompt: Any) -> dict[str, Any]:
        out = model.generate(prompt, policy, **options)
        return {
            "correct": tasks.grade(out.text, problem), "steps": out.steps, "tokens": out.tokens,
            "seconds": out.seconds, "computed_fraction": out.computed_fraction, "ids": out.ids,
        }  # fmt: skip

    for problem in problems(model, family, limit, longest):
        prompt = few_shot_prompt(model, problem, few_shot, shots) if few_shot else problem.prompt
        yield partial(answer, problem, prompt)


def few_shot_prompt(model: Runtime, problem: tasks.Problem, length: int, rng: random.Random) -> Any:
    """The ids [P] of a problem's prompt behind as many solved problems as fit into `length` tokens.

    A chat template that leaves out earlier turns ends the search.
    """
    turns = [{"role": "user", "content": problem.prompt}]
    ids = model.text.prompt(turns)
    while True:
        shot = tasks.generate(problem.family, rng, "train", rng.randint(*SHOT_STEPS))
        turns = [{"role": "user", "content": shot.prompt}, {"role": "assistant", "content": shot.solution}, *turns]
        longer = model.text.prompt(turns)
        if not len(ids) < len(longer) <= length:
            return ids
        ids = longer


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
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise OptionError(f"cannot read results from {file} ({error}); choose another file") from error
    if lines and not any(line.startswith('{"key"') for line in lines):
        raise OptionError(f"{file} holds something else than results; choose another --out")
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.keys() >= {"key", "result"}:
            yield entry


def append(file: Path, entry: dict[str, Any]) -> None:
    """Add one line to a results file."""
    with writing(file, "choose another --out"):
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab+") as stream:
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":  # the last line was cut short
                    stream.write(b"\n")
            stream.write(json.dumps(entry).encode() + b"\n")
