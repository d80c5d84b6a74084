"""The bench: same problems for every case, ratios problem by problem, a JSON line last."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import export
import runtime
from engines.errors import BackendError, OptionError
from runtime.bench.breakdown import SLICES, profile, rows
from runtime.bench.cases import Case, bench, cases, prompts, report
from runtime.cli import main
from tests.support.cases import refused

BYTES = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export.build("demo", tmp_path_factory.mktemp("demo") / "bundle", max_length=640)


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[runtime.Runtime]:
    with runtime.load(bundle, "onnxruntime", threads=1) as loaded:
        yield loaded


def test_prompts_are_filled_with_solved_problems(model: runtime.Runtime) -> None:
    drawn = list(prompts(model, 4, 300))
    assert [problem.family for _, problem in drawn] == ["sums", "programs"] * 2
    for ids, problem in drawn:
        assert 200 < len(ids) <= 300 and model.text.decode(ids).count("####") >= 1
        assert problem.prompt.split("\n")[0] in model.text.decode(ids)
    assert [list(ids) for ids, _ in prompts(model, 4, 300)] == [list(ids) for ids, _ in drawn]


def test_every_case_runs_every_problem(model: runtime.Runtime) -> None:
    measured = cases([model], ["full-greedy", "elastic"])
    assert list(bench(measured, 2, 150, 32)) == [1, 2]
    figures = report(measured, "onnxruntime full-greedy", 150, 32)
    first, second = figures["cases"]
    assert first["case"] == figures["baseline"] and first["times_faster"] == 1.0
    assert first["steps"] >= second["steps"] and first["layer_rows_computed"] == 1.0
    for row in figures["cases"]:
        assert row["problems"] == 2 and 0 < row["seconds"]["min"] <= row["seconds"]["p50"] <= row["seconds"]["p95"]
    assert "onnxruntime" in figures["devices"]["onnxruntime"] and figures["peak_rss_gib"] > 0


def test_ratios_are_paired(model: runtime.Runtime) -> None:
    slow = Case("slow", model, "full", {}, [2.0, 30.0, 4.0], [1] * 3, [1] * 3, [1.0] * 3, [True] * 3)
    fast = Case("fast", model, "full", {}, [1.0, 10.0, 1.0], [1] * 3, [1] * 3, [1.0] * 3, [True, True, False])
    figures = fast.figures(slow)
    assert figures["times_faster"] == 3.0 and figures["exact_match"] == pytest.approx(2 / 3)
    assert figures["tokens_per_second"] == 3 / 12


def test_the_command(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib; scripts/setup.sh installs it")
    arguments = ["--backends", "onnxruntime", "--policies", "elastic,dual", "--limit", "1", "--prompt-length", "150"]
    files = ["--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "p" / "b.png")]
    assert main(["bench", str(bundle), *arguments, "--gen-length", "32", "--threads", "1", *files]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line == json.loads((tmp_path / "b.json").read_text())
    assert [row["case"] for row in line["cases"]] == ["onnxruntime elastic", "onnxruntime dual"]
    assert line["baseline"] == "onnxruntime elastic" and line["command"].startswith("python -m runtime")
    assert (tmp_path / "p" / "b.png").read_bytes().startswith(BYTES)


def test_batches(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same sequences in batches of each size, ragged, and the tokens that they have alone."""
    arguments = ["--backends", "onnxruntime", "--policies", "elastic", "--limit", "1", "--prompt-length", "200"]
    rest = ["--gen-length", "32", "--threads", "1", "--batches", "1,3"]
    assert main(["bench", str(bundle), *arguments, *rest]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["batches"]
    assert [(row["batch"], row["sequences"], row["equal_to_alone"]) for row in rows] == [(1, 3, 3), (3, 3, 3)]
    assert rows[0]["times_faster"] == 1.0 and rows[1]["tokens_per_second"] > 0
    for wrong, words in (("1,x", ("whole numbers", "1,x")), ("99", ("batch of 99", "1 … 16", "--max-batch"))):
        assert main(["bench", str(bundle), *arguments, *rest[:-1], wrong]) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words), said


def test_what_is_refused_before_anything_runs(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong options, and a file that is not the bench's to write over."""
    monkeypatch.setattr("runtime.cli.bench.bench", lambda *_: pytest.fail("it ran"))
    text = tmp_path / "notes.md"
    text.write_text("# mine")
    for more, words in (
        (["--json", str(text)], ("notes.md", "something else", "another --json")),
        (["--plot", "x.foo"], ("x.foo", ".png")), (["--baseline", "foo"], ("'foo'", "choose from", "elastic")),
        (["--batches", "a"], ("whole numbers", "'a'")),
        (["--image", "x.png", "--batches", "1"], ("--image", "leave --batches")),
    ):  # fmt: skip
        assert main(["bench", str(bundle), "--backends", "onnxruntime", "--threads", "1", *more]) == 2
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
    assert text.read_text() == "# mine"


def test_refused(model: runtime.Runtime) -> None:
    with refused(OptionError, "unknown bench case 'fast'", "full-greedy, full, prefix"):
        cases([model], ["fast"])
    with refused(OptionError, "limit must be at least 1"):
        list(bench(cases([model], ["elastic"]), 0, 100, 32))


def test_a_profile_adds_up(model: runtime.Runtime) -> None:
    """The slices of each kind of step are its time; what is timed is not the walk's business."""
    drawn = [prompt for prompt, _ in prompts(model, 3, 150)]
    for gamma, kind in ((0.5, "reuse"), (0.999, "refresh")):
        found = profile(model, drawn, 32, "elastic", {"gamma": gamma})
        plain = [model.generate(prompt, gen_length=32, gamma=gamma) for prompt in drawn]
        assert sum(slices["steps"] for slices in found.values()) == sum(out.steps for out in plain)
        assert found["first"]["steps"] == 3 and found[kind]["steps"] > 0
        for slices in found.values():
            assert all(slices[name] >= 0 for name in SLICES if name != "Python"), slices
            assert slices["layers"] > slices["sampling"]
    assert [line[0] for line in rows(found)] == list(SLICES)


def test_a_profile_leaves_a_running_answer_alone(model: runtime.Runtime) -> None:
    expected = model.generate("Hi", gen_length=16).ids
    events = model.stream("Hi", gen_length=16)
    next(events)
    with refused(BackendError, "in use"):
        profile(model, ["Hi"], 16, "elastic", {})
    *_, out = events
    assert out.ids == expected  # type: ignore[union-attr]


def test_a_profile_needs_engines_that_run_one_by_one(bundle: Path) -> None:
    with (
        runtime.load(bundle, "eager", threads=1) as eager,
        refused(OptionError, "eager does not run its engines one by one", "another back end"),
    ):
        profile(eager, [np.array([1, 2])], 8, "elastic", {})
