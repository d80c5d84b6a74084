"""The problems: solutions are correct, splits are disjoint, and the training's columns are where it expects them."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from export.build import DEMO
from runtime.evaluation import tasks
from scripts.experiments import train_demo

VERBS = dict.fromkeys(tasks.GAINS, "+") | dict.fromkeys(tasks.LOSSES, "-") | dict.fromkeys(tasks.FACTORS, "*")
draws = st.tuples(st.integers(), st.sampled_from(tasks.SPLITS), st.integers(1, 14))


def apply(left: int, op: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[op]


@given(draws)
def test_sums_are_worked_out(draw: tuple[int, str, int]) -> None:
    seed, split, steps = draw
    problem = tasks.generate("sums", random.Random(seed), split, steps)
    first, *story, question = problem.prompt.split("\n")
    value = int(re.findall(r"\d+", first)[0])
    *work, answer = problem.solution.split("\n")
    assert len(story) == len(work) == steps and question.startswith("How many")
    for sentence, worked in zip(story, work, strict=True):
        letter, verb, *rest = sentence.split()
        operand = int(rest[0]) if rest else tasks.FACTORS[verb]
        result = apply(value, VERBS[verb], operand)
        assert worked == f"{letter} {value:02d} {VERBS[verb]} {operand:02d} = {result:02d}"
        assert 0 <= result <= 99
        value = result
    assert answer == f"#### {value:02d}" and problem.answer == f"{value:02d}"


@given(draws)
def test_programs_are_traced(draw: tuple[int, str, int]) -> None:
    seed, split, steps = draw
    problem = tasks.generate("programs", random.Random(seed), split, steps)
    *code, returned = problem.prompt.split("\n")
    values: dict[str, int] = {}
    expected = []
    for statement in code:
        name, right = statement.split(" = ")
        if right.isdigit():
            values[name] = int(right)
            continue
        a, op, b = right.split()
        known = values[a], values[b] if b in values else int(b)
        values[name] = apply(known[0], op, known[1])
        assert 0 <= values[name] <= 99
        expected += [f"{statement} = {known[0]:02d} {op} {known[1]:02d}", f"{name} = {values[name]:02d}"]
    result = values[returned.removeprefix("return ")]
    assert len(expected) == 2 * steps
    assert problem.solution.split("\n") == [*expected, returned, f"#### {result:02d}"]
    assert problem.answer == f"{result:02d}"


def test_splits_do_not_meet() -> None:
    for family in tasks.FAMILIES:
        sides = {
            split: {tasks.generate(family, random.Random(seed), split, 1 + seed % 4).prompt for seed in range(400)}
            for split in tasks.SPLITS
        }
        assert not sides["train"] & sides["test"] and all(tasks.split_of(p) == "test" for p in sides["test"])


@given(draws, st.sampled_from(tasks.FAMILIES))
def test_the_same_seed_gives_the_same_problem(draw: tuple[int, str, int], family: str) -> None:
    seed, split, steps = draw
    once, again = (tasks.generate(family, random.Random(seed), split, steps) for _ in range(2))
    assert once == again


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_training_finds_its_columns(family: str) -> None:
    """With the demo's tokenizer a worked step has the tokens and the result columns of `train_demo.STEP`."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    step, rng = train_demo.STEP[family], random.Random(0)
    for text in (tasks.drill(family, rng, 12), tasks.generate(family, rng, "train", 10).solution):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        for start in range(0, len(ids) // step.width * step.width, step.width):
            line = tokenizer.decode(ids[start : start + step.width])
            result = tokenizer.decode([ids[start + column] for column in step.results[:2]])
            assert line.endswith("\n") and line.strip().endswith(result.strip()), line
            operands = [
                tokenizer.decode([ids[start + c]]).strip() for c in step.lookups[0][-2:] if family == "programs"
            ]
            assert all(part.isdigit() for part in operands)


def test_grading() -> None:
    problem = tasks.Problem("sums", "?", "#### 07", "07")
    assert tasks.grade("a 03 + 04 = 07\n#### 07", problem) and tasks.grade("#### 01\n#### 07", problem)
    assert not tasks.grade("#### 7", problem) and not tasks.grade("07", problem) and not tasks.grade("", problem)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("riddles", "train", 3), "'riddles'"), (("sums", "dev", 3), "'dev'"), (("sums", "test", 0), "1 … 23")],
)
def test_refused(arguments: tuple[str, str, int], words: str) -> None:
    family, split, steps = arguments
    with pytest.raises(ValueError, match=re.escape(words)):
        tasks.generate(family, random.Random(0), split, steps)
