"""Holes of a canvas while it is decoded: which ids each may take, and which commits of one step agree.

A canvas is ids with masks anywhere and fixed tokens around and behind them (`Sequence.over`). Ids that a hole cannot
take have no probability there. A choice is narrowed by each commit in its hole; of commits of one step that no choice
has together, the more confident stay.
"""

from collections.abc import Sequence as Ordered
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.decoding.sequence import Positions, Sequence

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Hole:
    """Masks at `start` … `start + length - 1`, by name.

    `allowed` [V] marks the ids that each may take (None: all), `first` [V] those of
    the first mask (None: as the others). `choices` are the ids of which one fills the
    hole, each filled up with an end to its length.
    """

    name: str
    start: int
    length: int
    allowed: NDArray[np.bool_] | None = None
    first: NDArray[np.bool_] | None = None
    choices: tuple[Ids, ...] = ()

    @property
    def span(self) -> range:
        """Its positions."""
        return range(self.start, self.start + self.length)

    @property
    def typed(self) -> bool:
        """Whether there are ids that it cannot take."""
        return self.allowed is not None or bool(self.choices)

    def left(self, filled: dict[int, int]) -> list[Ids]:
        """The choices that agree with the tokens `filled`, by position."""
        return [ids for ids in self.choices if all(ids[at - self.start] == token for at, token in filled.items())]


class Canvas:
    """The holes of one sequence, in ascending order."""

    def __init__(self, holes: Ordered[Hole]):
        self.holes = tuple(holes)
        self.typed = [hole for hole in self.holes if hole.typed]

    @property
    def spans(self) -> tuple[range, ...]:
        """The positions of each hole."""
        return tuple(hole.span for hole in self.holes)

    def hole_at(self, position: int) -> Hole | None:
        """The hole with types that a position lies in."""
        return next((hole for hole in self.typed if position in hole.span), None)

    def restricts(self, candidates: Positions) -> bool:
        """Whether one of the candidates cannot take every id."""
        return any(self.hole_at(position) is not None for position in candidates.tolist())

    def bar(self, sequence: Sequence, candidates: Positions, logits: NDArray[np.floating]) -> None:
        """Give the ids that candidates [W] cannot take a logit [W, V] of minus infinity, in place."""
        for row, position in enumerate(candidates.tolist()):
            hole = self.hole_at(position)
            if hole is None:
                continue
            possible = hole.first if position == hole.start and hole.first is not None else hole.allowed
            if possible is None:
                possible = np.zeros(logits.shape[-1], bool)
                possible[[ids[position - hole.start] for ids in hole.left(committed(sequence, hole))]] = True
            logits[row, ~possible] = -np.inf

    def agreeing(
        self, sequence: Sequence, positions: Positions, tokens: Positions, ranks: NDArray[np.floating]
    ) -> NDArray[np.bool_]:
        """Which of the commits [n] of a step stay: within a choice those that some choice has together."""
        kept = np.ones(len(positions), bool)
        taken: dict[str, dict[int, int]] = {}
        for index in np.argsort(-ranks, kind="stable").tolist():
            position, hole = int(positions[index]), self.hole_at(int(positions[index]))
            if hole is None or not hole.choices:
                continue
            filled = taken.setdefault(hole.name, committed(sequence, hole))
            kept[index] = bool(hole.left(filled | {position: int(tokens[index])}))
            if kept[index]:
                filled[position] = int(tokens[index])
        return kept


def committed(sequence: Sequence, hole: Hole) -> dict[int, int]:
    """The tokens of a hole that are filled, by position."""
    ids = sequence.ids[hole.start : hole.start + hole.length]
    return {hole.start + at: int(ids[at]) for at in np.flatnonzero(ids != sequence.mask_id).tolist()}
