"""Results of an evaluation: what is kept, what is resumed, and what is refused before a problem runs."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

import runtime
from engines.errors import OptionError
from runtime.evaluation import tasks
from runtime.evaluation.exact_match import (
    append,
    compare,
    entries,
    evaluate,
    few_shot_prompt,
    problems,
    read,
    summary,
)
from scripts.experiments.summarize_eval import collect, summarize
from tests.support.cases import refused

KEY = {
    "checkpoint": "c", "precision": "fp32", "backend": "onnxruntime", "weights": None, "family": "sums", "few_shot": 0,
    "gen_length": 8,
}  # fmt: skip


def result(number: int, correct: bool, ids: list[int], seconds: float = 1.0) -> dict[str, Any]:
    return {"number": number, "correct": correct, "steps": 2, "tokens": len(ids), "seconds": seconds,
            "computed_fraction": 0.5, "ids": ids}  # fmt: skip


def test_nothing_runs_without_the_statistics_library(golden: runtime.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "statsmodels", None)
    monkeypatch.setattr(golden, "generate", lambda *_, **__: pytest.fail("a problem ran"))
    with refused(OptionError, "evaluation needs statsmodels", "pip install 'elastic-diffusion[eval]'"):
        evaluate(golden, "sums", 1, None, {})


class Words:
    """A model whose tokens are words; a prompt has those of its last `turns` messages, and `more`."""

    def __init__(self, turns: int, more: int = 0):
        self.turns, self.more, self.text, self.asked = turns, more, self, 0

    def prompt(self, messages: Any) -> list[str]:
        self.asked += 1
        texts = [messages] if isinstance(messages, str) else [message["content"] for message in messages[-self.turns :]]
        return [word for text in texts for word in text.split()] + ["more"] * self.more


def test_prompts_that_never_grow_end_the_search() -> None:
    """A chat template that shows the last message only."""
    model: Any = Words(turns=1)
    rng = random.Random(0)
    problem = tasks.generate("sums", rng, "test", 4)
    assert few_shot_prompt(model, problem, 10**6, rng) == problem.prompt.split() and model.asked < 10
    model = Words(turns=1000)
    grown = few_shot_prompt(model, problem, 400, rng)
    assert 300 < len(grown) <= 400 and grown[-3:] == problem.prompt.split()[-3:]


def test_problems_that_fit_are_found_or_refused() -> None:
    model: Any = Words(turns=1)
    lengths = [len(problem.prompt.split()) for problem in problems(model, "sums", 40)]
    longest = sorted(lengths)[5]
    found = problems(model, "sums", 10, longest)
    assert len(found) == 10 and all(len(problem.prompt.split()) <= longest for problem in found)
    for more, given, remedy in ((0, 3, "a smaller --gen-length"), (200, 128, "another --task")):
        with refused(OptionError, f"more than {given} tokens for almost every problem of sums", remedy):
            problems(Words(1, more), "sums", 10, given)  # type: ignore[arg-type]


def test_options_are_refused_before_a_problem_runs(text_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime.load(text_bundle, "onnxruntime", threads=1) as model:
        monkeypatch.setattr(model, "generate", lambda *_, **__: pytest.fail("a problem ran"))
        for options, more, words in (
            ({"gen_length": 256}, {}, ("gen_length must lie in 1 … 255",)), ({"window": 99}, {}, ("window", "1 … 16")),
            ({"gen_length": 56}, {"few_shot": 201}, ("few_shot must lie in 0 … 200", "less gen_length")),
        ):  # fmt: skip
            with refused(OptionError, *words):
                evaluate(model, "sums", 1, None, options, **more)  # type: ignore[arg-type]


def test_a_line_that_was_cut_short_is_skipped(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "results.jsonl"
    append(file, {"key": KEY, "result": result(0, True, [1])})
    with file.open("a") as stream:
        stream.write('{"key": {"checkpoi')
    append(file, {"key": KEY, "result": result(1, False, [2])})
    append(file, {"key": KEY | {"family": "programs"}, "result": result(2, False, [3])})
    assert [entry["result"]["number"] for entry in entries(file)] == [0, 1, 2]
    assert read(file, KEY) == {0: result(0, True, [1]), 1: result(1, False, [2])}
    assert read(tmp_path / "none", KEY) == read(None, KEY) == {}


def test_the_summary_keeps_what_the_figures_need(tmp_path: Path) -> None:
    """Two families and two settings: figures of each, and the paired ones over both families."""
    file = tmp_path / "results.jsonl"
    answers = {
        ("full", "sums"): [(True, [1, 2]), (True, [3])], ("full", "programs"): [(False, [4]), (True, [5])],
        ("elastic", "sums"): [(True, [1, 2]), (False, [9])], ("elastic", "programs"): [(False, [4]), (True, [5])],
    }  # fmt: skip
    for (policy, family), found in answers.items():
        for number, (correct, ids) in reversed(list(enumerate(found))):  # a resumed file is not in order
            seconds = 4.0 if policy == "full" else 1.0
            append(file, {"key": KEY | {"family": family, "policy": policy},
                          "result": result(number, correct, ids, seconds)})  # fmt: skip
    settings = collect(file)
    kept = summarize(settings, "full")
    assert [run["correct_each"] for run in kept["runs"]] == ["11", "01", "10", "01"]
    assert kept["runs"][0]["key"]["policy"] == "full" and kept["runs"][0]["exact_match"] == 1.0
    for (_, results), run in zip(settings, kept["runs"], strict=True):
        assert summary(results).items() <= run.items()
    (pair,) = kept["paired"]
    assert pair["setting"] == {name: value for name, value in KEY.items() if name != "family"} | {"policy": "elastic"}
    assert (pair["problems"], pair["gained"], pair["lost"], pair["times_faster"]) == (4, 0, 1, 4.0)
    assert pair["agreement"] == pair["same_answers"] == 0.75
    full, elastic = settings[0][1] + settings[1][1], settings[2][1] + settings[3][1]
    assert compare(elastic, full).items() <= pair.items()
    assert "ids" not in json.dumps(kept)
