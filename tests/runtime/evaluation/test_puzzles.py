"""Sudoku and vote: what is drawn follows the rules, and the shipped checkpoints solve it in place on every back end."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import export
import runtime
from engines.errors import OptionError
from export.cli import main
from runtime.evaluation import puzzles
from runtime.evaluation.exact_match import evaluate, summary
from runtime.evaluation.in_place import encoded
from tests.support.cases import refused
from tests.support.fake_gpu import fake_gpu

WHOLE = {"block_length": 128}  # one block: any hole may be next
ONE = {"threshold": None, "tokens_per_step": 1, "window": 32}


@pytest.fixture(scope="module", params=puzzles.FAMILIES)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with fake_gpu():
        return export.build(
            request.param, tmp_path_factory.mktemp(request.param) / request.param, backends=["all"], window=32,
            max_length=128,
        )  # fmt: skip


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[runtime.Runtime]:
    with runtime.load(bundle, "onnxruntime", threads=1) as loaded:
        yield loaded


def test_sudokus_have_one_solution() -> None:
    rng = random.Random(0)
    for split in ("train", "test"):
        for _ in range(20):
            puzzle = puzzles.sudoku(rng, split)
            digits = [int(word) for word in puzzle.words if word != "|"]
            assert len(digits) == 36 and puzzles.split_of(digits) == split
            for house in range(18):
                assert {digit for cell, digit in enumerate(digits) if house in puzzles.houses(cell)} == set(range(1, 7))
            holes = {hole - hole // 7 for hole in puzzle.holes}
            assert 8 <= len(holes) <= 28 and all(puzzle.words[hole] != "|" for hole in puzzle.holes)
            assert puzzles.is_unique([0 if cell in holes else digit for cell, digit in enumerate(digits)])
    assert not puzzles.is_unique([0] * 36)


def test_votes_are_counted() -> None:
    rng = random.Random(0)
    for _ in range(50):
        puzzle = puzzles.vote(rng)
        values = {word[0]: int(word[1]) for word in puzzle.words[: puzzles.GIVEN]}
        assert {0, 1} <= set(values.values()) and len(puzzle.holes) == puzzles.LINES
        for hole in puzzle.holes:
            *voters, name, value = puzzle.words[hole - 6 : hole + 1]
            values[name[0]] = int(sum(values[voter] for voter in voters) <= 2)
            assert value == f"{name[0]}{values[name[0]]}"


def test_most_are_solved(model: runtime.Runtime, bundle: Path) -> None:
    """The figures of docs/QUALITY.md have 500 each."""
    found = summary(evaluate(model, bundle.name, 40, "full", WHOLE))
    print(bundle.name, found)
    assert found["exact_match"] >= 0.9 and found["computed_fraction"] == 1


def test_every_back_end_fills_alike(bundle: Path, model: runtime.Runtime) -> None:
    rng = random.Random(5)
    drawn = [encoded(model, puzzles.generate(bundle.name, rng, "test")) for _ in range(4)]
    with fake_gpu(), runtime.load(bundle, "eager") as eager, runtime.load(bundle, "tensorrt") as gpu:
        for ids, holes in drawn:
            canvas = ids.copy()
            canvas[holes] = model.bundle.config.mask_id
            for policy, options in (("full", WHOLE), ("elastic", ONE | {"gamma": 0.9, "refresh_start": "first"})):
                outs = [m.fill(canvas, policy=policy, **options).output.sequence for m in (model, eager, gpu)]
                assert outs[0] == outs[1] == outs[2]
                fixed = np.setdiff1d(np.arange(len(ids)), holes)
                assert (np.array(outs[0])[fixed] == ids[fixed]).all()


def test_what_puzzles_do_not_have(
    model: runtime.Runtime, bundle: Path, text_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refused(OptionError, "few_shot", "leave it out"):
        evaluate(model, bundle.name, 2, "full", {}, few_shot=5)
    words = "no token for each word", f"--checkpoint {bundle.name}"
    with runtime.load(text_bundle, "onnxruntime", threads=1) as other, refused(OptionError, *words):
        evaluate(other, bundle.name, 2, "full", {})
    monkeypatch.chdir(tmp_path)  # the command that the message prints makes a bundle that fits
    assert main(["build", "--checkpoint", bundle.name]) == 0
    with runtime.load(Path("bundles") / bundle.name, "onnxruntime", threads=1) as other:
        evaluate(other, bundle.name, 1, "full", {})
    with refused(OptionError, "steps are spread over blocks", "leave steps out"):
        evaluate(model, bundle.name, 1, "full", {"steps": 8})
