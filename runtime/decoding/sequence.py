"""The sequence being decoded: its ids, which positions are still masked, and where it ends.

Host state, in positions.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]
NO_POSITIONS: Positions = np.zeros(0, np.int64)


def union(length: int, *positions: Positions) -> Positions:
    """The union of some arrays of positions below `length`, ascending [n]; for few positions faster than sorting."""
    found = np.zeros(length, bool)
    for some in positions:
        found[some] = True
    return np.flatnonzero(found)


@dataclass
class Sequence:
    """The ids of prompt and answer, one for each position; commits fill the masks of the answer.

    An EOS is any of the ids `ends`. `last` [n] holds the positions of the latest
    commit, `history` those of all. With `stops`, `end` is the lowest EOS position of
    the first step that committed an EOS: masks after it are not filled any more. With
    `whole_blocks` they are, until none is left before the first EOS.
    `remaining` counts the masks of the answer that are not appended yet. The row
    of position p predicts position p + `shift`. With `holes`, masks lie there and
    fixed tokens anywhere else, so `prompt_length` counts those before the first hole;
    each hole ends by itself: the first EOS in it fills its masks behind.
    """

    ids: Positions
    prompt_length: int
    mask_id: int
    ends: tuple[int, ...]
    stops: bool = True
    last: Positions = field(default_factory=NO_POSITIONS.copy)
    end: int | None = None
    remaining: int = 0
    shift: int = 0
    whole_blocks: bool = False
    answer_length: int | None = None
    history: list[Positions] = field(default_factory=list)
    holes: tuple[range, ...] = ()
    _masked: Positions | None = None  # `masked`, computed once a step

    @classmethod
    def start(
        cls, prompt: Positions, gen_length: int, mask_id: int, ends: tuple[int, ...], stops: bool = True,
        masks: int | None = None, shift: int = 0, whole_blocks: bool = False, answer_length: int | None = None,
    ) -> "Sequence":  # fmt: skip
        """A prompt [P] and an answer of `gen_length` masks, the first `masks` of them appended (None: all).

        The answer has at most `answer_length` ids (None: all).
        """
        sequence = cls(
            ids=prompt.astype(np.int64), prompt_length=len(prompt), mask_id=mask_id, ends=ends, stops=stops,
            remaining=gen_length, shift=shift, whole_blocks=whole_blocks, answer_length=answer_length,
        )  # fmt: skip
        sequence.append_masks(gen_length if masks is None else masks)
        return sequence

    @classmethod
    def over(
        cls, ids: Positions, holes: tuple[range, ...], mask_id: int, ends: tuple[int, ...], stops: bool = True,
        shift: int = 0,
    ) -> "Sequence":  # fmt: skip
        """Ids [P] with masks in `holes`, in ascending order; those at the end of the ids are not appended yet."""
        tail = len(holes[-1]) if holes[-1].stop == len(ids) else 0
        return cls(
            ids=ids[: len(ids) - tail].astype(np.int64), prompt_length=holes[0].start, mask_id=mask_id, ends=ends,
            stops=stops, remaining=tail, shift=shift, holes=holes,
        )  # fmt: skip

    def append_masks(self, count: int) -> Positions:
        """Append up to `count` of the remaining masks; returns their positions."""
        count = min(count, self.remaining)
        self.ids = np.concatenate([self.ids, np.full(count, self.mask_id)])
        self.remaining -= count
        self._masked = None
        return np.arange(len(self.ids) - count, len(self.ids))

    @property
    def total(self) -> int:
        """Positions of the sequence when all masks are appended."""
        return len(self.ids) + self.remaining

    @property
    def span(self) -> int:
        """Positions from the first mask to the last, as they were at the start."""
        return (self.holes[-1].stop if self.holes else self.total) - self.prompt_length

    @property
    def tail_start(self) -> int:
        """The position behind the last fixed token, from which masks may be appended."""
        if not self.holes:
            return self.prompt_length
        return self.holes[-1].start if self.holes[-1].stop >= self.total else self.total

    def masks_of(self, start: int, end: int) -> int:
        """How many of the positions `start` … `end` - 1, behind the prompt, were masks at the start."""
        if not self.holes:
            return end - start
        return sum(max(0, min(end, hole.stop) - max(start, hole.start)) for hole in self.holes)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def masked(self) -> Positions:
        """All positions that hold a mask."""
        if self._masked is None:
            self._masked = np.flatnonzero(self.ids == self.mask_id)
        return self._masked

    @property
    def open(self) -> Positions:
        """Positions of the masks still to be filled: those not after the end."""
        masked = self.masked
        return masked if self.end is None or self.whole_blocks else masked[masked <= self.end]

    def logits_rows(self, positions: Positions) -> Positions:
        """The positions whose rows predict `positions` [n]; position 0 is predicted by its own row."""
        return np.maximum(positions - self.shift, 0) if self.shift else positions

    @property
    def done(self) -> bool:
        """Whether no mask is left to fill."""
        if self.whole_blocks:
            return (self.stops and self.said_eos) or len(self.open) + self.remaining == 0
        return len(self.open) == 0

    def commit(self, positions: Positions, tokens: Positions) -> None:
        """Fill masks; the first step that commits an EOS sets the end."""
        chosen = tokens.tolist()
        assert (self.ids[positions] == self.mask_id).all() and self.mask_id not in chosen
        self.ids[positions] = tokens
        self._masked = None
        self.last = np.sort(positions)
        self.history.append(self.last)
        if not self.stops or not any(token in self.ends for token in chosen):
            return
        ended = positions[np.isin(tokens, self.ends)]
        if self.holes:
            for position in ended.tolist():
                self._close(position)
        elif self.end is None:
            self.end = int(ended.min())

    def _close(self, position: int) -> None:
        """Fill the masks of a hole behind the EOS at `position` with it; their rows are run again as commits are."""
        hole = next(hole for hole in self.holes if position in hole)
        masked = self.masked
        behind = masked[(masked > position) & (masked < hole.stop)]
        self.ids[behind] = self.ids[position]
        self._masked = None
        self.last = np.union1d(self.last, behind)
        if hole.stop > len(self.ids):
            self.remaining = 0

    def filled(self, hole: range) -> Positions:
        """The ids [n] of a hole before its first EOS or mask."""
        return before_first(self.ids[hole.start : hole.stop], (self.mask_id, *self.ends))

    @property
    def answer(self) -> Positions:
        """The answer's ids [n] before its first EOS or mask by position: those that are settled."""
        ids = self.ids[self.prompt_length :]
        return before_first(ids[: self.answer_length], (self.mask_id, *self.ends))

    @property
    def said_eos(self) -> bool:
        """Whether an EOS ends the settled part of the answer."""
        at = self.prompt_length + len(self.answer)
        return at < len(self.ids) and int(self.ids[at]) in self.ends


def before_first(ids: Positions, tokens: tuple[int, ...]) -> Positions:
    """The ids [n] before the first that is one of `tokens`; all of them without one."""
    found = np.flatnonzero(np.isin(ids, tokens))
    return ids[: found[0]] if len(found) else ids
