"""Results of an evaluation: what is kept, what is resumed, and what is refused before a problem runs."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import runtime
from engines.errors import OptionError
from runtime.evaluation.exact_match import append, compare, entries, evaluate, read, summary
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
