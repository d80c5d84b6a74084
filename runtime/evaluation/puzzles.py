"""Two tasks that are filled in place: Sudoku of six by six, and votes that depend on each other.

A Sudoku is six rows of six digits, each row, column and box of two by three with all of 1 to 6; 8 to 28 cells are holes
and the solution is unique. A vote has five given bits and ten lines; a line names five earlier variables (repeats are
allowed) and a new one, and its hole is the value that fewer of the five have. So a value that is filled in changes what
the fixed names behind it mean, through a chain that one pass does not resolve.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product

SIDE, BOX_ROWS, BOX_COLUMNS = 6, 2, 3
FAMILIES = "sudoku", "vote"
HOLES = 8, 28  # of a Sudoku, fewest and most
GIVEN, LINES, VOTERS = 5, 10, 5
RECENT, NEAREST = 0.6, 4  # the fraction of voters that are among the last variables, and how many these are
NAMES = "abcdefghijklmnop"
FULL = (1 << SIDE) - 1


@dataclass(frozen=True)
class Puzzle:
    """A text in words of one token each, and which of them are holes."""

    family: str
    words: tuple[str, ...]
    holes: tuple[int, ...]

    @property
    def solved(self) -> str:
        """The text with its holes filled."""
        return " ".join(self.words)


@cache
def houses(cell: int) -> tuple[int, int, int]:
    """Row, column and box of a cell, as indices of one list of 18."""
    row, column = divmod(cell, SIDE)
    return row, SIDE + column, 2 * SIDE + row // BOX_ROWS * (SIDE // BOX_COLUMNS) + column // BOX_COLUMNS


class Grid:
    """Digits by cell (0 for an open one), and the digits that each row, column and box has."""

    def __init__(self, digits: list[int] | None = None):
        self.digits, self.used = digits or [0] * SIDE**2, [0] * (3 * SIDE)
        for cell, digit in enumerate(self.digits):
            if digit:
                self.mark(cell, digit, True)

    def mark(self, cell: int, digit: int, taken: bool) -> None:
        self.digits[cell] = digit if taken else 0
        for house in houses(cell):
            self.used[house] ^= 1 << digit - 1

    def tightest(self) -> tuple[int, list[int]] | None:
        """The open cell with the fewest possible digits, and these; None if no cell is open."""
        best: tuple[int, int, int] | None = None
        for cell, digit in enumerate(self.digits):
            if not digit:
                row, column, box = houses(cell)
                free = FULL & ~(self.used[row] | self.used[column] | self.used[box])
                if best is None or free.bit_count() < best[0]:
                    best = free.bit_count(), cell, free
                    if best[0] < 2:
                        break
        return best and (best[1], [digit for digit in range(1, SIDE + 1) if best[2] >> digit - 1 & 1])

    def solutions(self, rng: random.Random | None = None) -> Iterator[list[int]]:
        """All ways to fill the open cells, in the order of `rng` if there is one."""
        found = self.tightest()
        if found is None:
            yield list(self.digits)
            return
        cell, digits = found
        if rng is not None:
            rng.shuffle(digits)
        for digit in digits:
            self.mark(cell, digit, True)
            yield from self.solutions(rng)
            self.mark(cell, digit, False)


def is_unique(digits: list[int]) -> bool:
    """Whether a Sudoku has one solution."""
    solutions = Grid(list(digits)).solutions()
    return next(solutions, None) is not None and next(solutions, None) is None


def split_of(digits: list[int]) -> str:
    """The split that a solved grid belongs to, by its digits alone: one of 32 is for tests."""
    return "test" if random.Random(repr(digits)).randrange(32) == 0 else "train"


def sudoku(rng: random.Random, split: str, low: int = HOLES[0], high: int = HOLES[1]) -> Puzzle:
    """A Sudoku with `low` to `high` holes whose solution is of a split."""
    while True:
        solved = next(Grid().solutions(rng))
        if split_of(solved) != split:
            continue
        wanted, open_ = rng.randint(low, high), list(solved)
        for cell in rng.sample(range(SIDE**2), SIDE**2):
            if open_.count(0) == wanted:
                break
            digit, open_[cell] = open_[cell], 0
            if not is_unique(open_):
                open_[cell] = digit
        if open_.count(0) >= low:
            return grid_text(solved, open_)


def grid_text(solved: list[int], open_: list[int]) -> Puzzle:
    """The puzzle of a solved grid and of one with 0 in its holes."""
    words: list[str] = []
    holes = []
    for cell, digit in enumerate(solved):
        if not open_[cell]:
            holes.append(len(words))
        words.append(str(digit))
        if cell % SIDE == SIDE - 1:
            words.append("|")
    return Puzzle("sudoku", tuple(words), tuple(holes))


def vote(rng: random.Random) -> Puzzle:
    """Given bits, one of them low and one high, and lines that vote."""
    names = rng.sample(NAMES, GIVEN + LINES)
    values = [0, 1, *(rng.randrange(2) for _ in range(GIVEN - 2))]
    words = [f"{name}{value}" for name, value in zip(names, values, strict=False)]
    holes = []
    for count in range(GIVEN, GIVEN + LINES):
        voters = [
            rng.randrange(max(0, count - NEAREST), count) if rng.random() < RECENT else rng.randrange(count)
            for _ in range(VOTERS)
        ]
        values.append(int(2 * sum(values[voter] for voter in voters) < VOTERS))
        words += [*(names[voter] for voter in voters), f"{names[count]}:", f"{names[count]}{values[-1]}"]
        holes.append(len(words) - 1)
    return Puzzle("vote", tuple(words), tuple(holes))


def vocabulary(family: str) -> list[str]:
    """The words of a family."""
    if family == "sudoku":
        return [*map(str, range(1, SIDE + 1)), "|", "."]
    return [*NAMES, *(f"{name}:" for name in NAMES), *(f"{name}{bit}" for bit, name in product((0, 1), NAMES))]


def generate(family: str, rng: random.Random, split: str) -> Puzzle:
    """A puzzle of a family; votes have no splits, as none is drawn twice."""
    return sudoku(rng, split) if family == "sudoku" else vote(rng)
