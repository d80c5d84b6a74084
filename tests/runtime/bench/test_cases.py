"""The bench: the same problems for every case, and ratios problem by problem."""

import pytest

import runtime
from engines.errors import OptionError
from runtime.bench.cases import Case, bench, cases, prompts, report
from tests.support.cases import refused


def test_prompts_are_filled_with_solved_problems(model: runtime.Runtime) -> None:
    drawn = list(prompts(model, 4, 300))
    assert [problem.family for _, problem in drawn] == ["sums", "programs"] * 2
    for ids, problem in drawn:
        assert 200 < len(ids) <= 300 and model.text.decode(ids).count("####") >= 1
        assert problem.prompt.split("\n")[0] in model.text.decode(ids)
    assert [list(ids) for ids, _ in prompts(model, 4, 300)] == [list(ids) for ids, _ in drawn]


@pytest.mark.slow
def test_every_case_runs_every_problem(model: runtime.Runtime) -> None:
    measured = cases([model], ["full-greedy", "elastic"])
    assert list(bench(measured, 2, 150, 32)) == [1, 2]
    figures = report(measured, "onnxruntime full-greedy", 150, 32)
    first, second = figures["cases"]
    assert first["case"] == figures["baseline"] and first["times_faster"] == 1.0
    assert first["steps"] >= second["steps"] and first["computed_fraction"] == 1.0
    for row in figures["cases"]:
        assert row["problems"] == 2 and 0 < row["seconds"]["min"] <= row["seconds"]["p50"] <= row["seconds"]["p95"]
    assert "onnxruntime" in figures["devices"]["onnxruntime"] and figures["peak_rss_gib"] > 0


def test_ratios_are_paired(model: runtime.Runtime) -> None:
    slow = Case("slow", model, "full", {}, [2.0, 30.0, 4.0], [1] * 3, [1] * 3, [1.0] * 3, [True] * 3)
    fast = Case("fast", model, "full", {}, [1.0, 10.0, 1.0], [1] * 3, [1] * 3, [1.0] * 3, [True, True, False])
    figures = fast.figures(slow)
    assert figures["times_faster"] == 3.0 and figures["exact_match"] == pytest.approx(2 / 3)
    assert figures["tokens_per_second"] == 3 / 12


def test_refused(model: runtime.Runtime) -> None:
    with refused(OptionError, "unknown bench case 'fast'", "full-greedy, full, prefix"):
        cases([model], ["fast"])
    with refused(OptionError, "limit must lie in 1 …", "got 0"):
        list(bench(cases([model], ["elastic"]), 0, 100, 32))
