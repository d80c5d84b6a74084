"""Two families of problems with worked solutions, and how answers are graded.

`sums` is a short story of gains, losses and multiplications (multi-step arithmetic, as in GSM8K); `programs` is a
straight-line program to trace (as in HumanEval). A solution is worked step by step: in `sums` a line with the step's
letter, its two operands and its result; in `programs` the statement with values in place of names, then the result
under its name. It ends with `#### NN`. Numbers have two digits. Training and test problems are disjoint: the SHA-256
of a problem's text decides to which split it belongs.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

FAMILIES = ("sums", "programs")
SPLITS = ("train", "test")
STEPS = {"sums": (6, 12), "programs": (4, 8)}  # least and most worked steps of an evaluation's problems

NAMES = ("Tom", "Ann", "Sam", "Eva", "Max", "Mia", "Leo", "Zoe")
ITEMS = ("coins", "pens", "cards", "books", "shells", "stamps", "apples", "stones")
GAINS = ("buys", "finds", "wins", "gets")
LOSSES = ("sells", "loses", "gives", "drops")
FACTORS = {"doubles": 2, "triples": 3}
LETTERS = "abcdefghijklmnopqrstuvw"  # the steps; x, y and z are a program's inputs
INPUTS = "xyz"
ANSWER = re.compile(r"####\s*(\d+)")


@dataclass(frozen=True)
class Problem:
    """One problem: the question `prompt`, the worked text `solution`, and its final number `answer`."""

    family: str
    prompt: str
    solution: str
    answer: str


def generate(family: str, rng: random.Random, split: str, steps: int) -> Problem:
    """Draw one problem of `family` with `steps` worked lines from `split` ("train" or "test").

    Raises ValueError for an unknown family or split, or steps outside 1 … 23.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown task family {family!r}; known: {', '.join(FAMILIES)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if not 1 <= steps <= len(LETTERS):
        raise ValueError(f"steps must lie in 1 … {len(LETTERS)}, got {steps}")
    draw = _sums if family == "sums" else _programs
    while True:
        problem = draw(rng, steps)
        if split_of(problem.prompt) == split:
            return problem


def in_turn(rng: random.Random, split: str, count: int) -> Iterator[Problem]:
    """Draw `count` problems of an evaluation's length, the families in turn."""
    for number in range(count):
        family = FAMILIES[number % len(FAMILIES)]
        yield generate(family, rng, split, rng.randint(*STEPS[family]))


def drill(family: str, rng: random.Random, count: int) -> str:
    """Draw `count` worked steps of `family` that do not depend on each other: training text for arithmetic alone."""
    lines = []
    for number in range(count):
        left, letter = rng.randint(0, 99), LETTERS[number % len(LETTERS)]
        op, right = _operation(rng, left)
        if family == "sums":
            lines.append(_line(letter, left, op, right))
        else:
            names = rng.choice(LETTERS[:16]), op, rng.choice(LETTERS[:16])
            lines.append(_trace(f"{letter} = {' '.join(names)}", left, op, right))
    return "".join(lines)


def split_of(prompt: str) -> str:
    """The split of a problem: one prompt in eight is for tests."""
    return "test" if hashlib.sha256(prompt.encode()).digest()[0] % 8 == 0 else "train"


def grade(text: str, problem: Problem) -> bool:
    """Exact match of the final answer: the last `#### NN` of `text`."""
    found = ANSWER.findall(text)
    return bool(found) and found[-1] == problem.answer


def _apply(left: int, op: str, right: int) -> int:
    return left + right if op == "+" else left - right if op == "-" else left * right


def _line(letter: str, left: int, op: str, right: int) -> str:
    return f"{letter} {left:02d} {op} {right:02d} = {_apply(left, op, right):02d}\n"


def _trace(statement: str, left: int, op: str, right: int) -> str:
    return f"{statement} = {left:02d} {op} {right:02d}\n{statement[0]} = {_apply(left, op, right):02d}\n"


def _operation(rng: random.Random, left: int) -> tuple[str, int]:
    """An operator and a constant that keep the result within 0 … 99."""
    while True:
        op = rng.choices("+-*", (4, 4, 1))[0]
        if op == "+" and left < 99:
            return op, rng.randint(1, 99 - left)
        if op == "-" and left > 0:
            return op, rng.randint(1, left)
        factor = rng.choice(tuple(FACTORS.values()))
        if op == "*" and left * factor <= 99:
            return op, factor


def _sums(rng: random.Random, steps: int) -> Problem:
    value, item = rng.randint(1, 99), rng.choice(ITEMS)
    story = [f"{rng.choice(NAMES)} has {value:02d} {item}.\n"]
    work = []
    for letter in LETTERS[:steps]:
        op, operand = _operation(rng, value)
        if op == "*":
            verb = next(word for word, factor in FACTORS.items() if factor == operand)
            story.append(f"{letter} {verb}\n")
        else:
            story.append(f"{letter} {rng.choice(GAINS if op == '+' else LOSSES)} {operand:02d}\n")
        work.append(_line(letter, value, op, operand))
        value = _apply(value, op, operand)
    prompt = "".join(story) + f"How many {item}?"
    return Problem("sums", prompt, "".join(work) + f"#### {value:02d}", f"{value:02d}")


def _programs(rng: random.Random, steps: int) -> Problem:
    values = {name: rng.randint(1, 99) for name in INPUTS[: rng.randint(2, len(INPUTS))]}
    digits = {str(digit): digit for digit in range(2, 10)}
    code = [f"{name} = {value:02d}\n" for name, value in values.items()]
    work = []
    for letter in LETTERS[:steps]:
        left = rng.choice(list(values)[-5:])
        names = [(op, name) for name in values if name != left for op in "+-"]
        constants = [(op, digit) for digit in digits for op in "+-*"]
        known = values | digits
        names, constants = (
            [(op, right) for op, right in pairs if 0 <= _apply(values[left], op, known[right]) <= 99]
            for pairs in (names, constants)
        )
        op, right = rng.choice(names if names and rng.random() < 0.6 else constants)
        statement = f"{letter} = {left} {op} {right}"
        code.append(f"{statement}\n")
        work.append(_trace(statement, values[left], op, known[right]))
        values[letter] = _apply(values[left], op, known[right])
    name = rng.choice(LETTERS[max(0, steps - 3) : steps])
    returned, answer = f"return {name}", f"{values[name]:02d}"
    return Problem("programs", "".join(code) + returned, "".join(work) + f"{returned}\n#### {answer}", answer)
