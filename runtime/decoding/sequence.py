"""The sequence being decoded: ids, what is still masked, where it ends.

Pure host state, in positions; it knows no slots, no device and no policy.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]
NO_POSITIONS: Positions = np.zeros(0, np.int64)


def union(length: int, *positions: Positions) -> Positions:
    """The positions below `length` that are in any of some arrays, ascending; quicker than sorting a few."""
    found = np.zeros(length, bool)
    for some in positions:
        found[some] = True
    return np.flatnonzero(found)


@dataclass
class Sequence:
    """Prompt and answer as ids [N]; masks of the answer are filled by commits.

    `eos_id` is None where decoding does not stop at EOS. `last` holds the
    positions of the latest commit, `end` the lowest EOS position of the first
    step that committed one: masks after it are not to be filled any more.
    `room` counts masks of the answer that are not there yet. The row of position
    p predicts position p + `shift`.
    """

    ids: Positions
    prompt_length: int
    mask_id: int
    eos_id: int | None
    last: Positions = field(default_factory=NO_POSITIONS.copy)
    end: int | None = None
    remaining: int = 0
    shift: int = 0
    _masked: Positions | None = None  # found once a step

    @classmethod
    def start(
        cls, prompt: Positions, gen_length: int, mask_id: int, eos_id: int | None, max_masks: int | None = None,
        shift: int = 0,
    ) -> "Sequence":  # fmt: skip
        """A prompt and `gen_length` masks, of which only the first `horizon` are there at first."""
        sequence = cls(prompt.astype(np.int64), len(prompt), mask_id, eos_id, remaining=gen_length, shift=shift)
        sequence.grow(max_masks or gen_length)
        return sequence

    def grow(self, count: int) -> Positions:
        """Append up to `count` of the masks that are not there yet; returns their positions."""
        count = min(count, self.remaining)
        self.ids = np.concatenate([self.ids, np.full(count, self.mask_id)])
        self.remaining -= count
        self._masked = None
        return np.arange(len(self.ids) - count, len(self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def masked(self) -> Positions:
        """All positions that hold [MASK]."""
        if self._masked is None:
            self._masked = np.flatnonzero(self.ids == self.mask_id)
        return self._masked

    @property
    def open(self) -> Positions:
        """Masks still to be filled: those not after the end."""
        masked = self.masked
        return masked if self.end is None else masked[masked <= self.end]

    def logits_rows(self, positions: Positions) -> Positions:
        """The positions whose rows predict `positions`; the first position's row predicts itself too."""
        return np.maximum(positions - self.shift, 0) if self.shift else positions

    @property
    def done(self) -> bool:
        return len(self.open) == 0

    def commit(self, positions: Positions, tokens: Positions) -> None:
        """Fill masks; the first step that commits an EOS sets the end."""
        chosen = tokens.tolist()
        assert (self.ids[positions] == self.mask_id).all() and self.mask_id not in chosen
        self.ids[positions] = tokens
        self._masked = None
        self.last = np.sort(positions)
        if self.end is None and self.eos_id in chosen:
            self.end = int(positions[tokens == self.eos_id].min())

    def answer(self, eos_id: int) -> Positions:
        """The answer's ids up to the first EOS by position, without masks that were never filled."""
        ids = self.ids[self.prompt_length :]
        ends = np.flatnonzero(ids == eos_id)
        ids = ids[: ends[0]] if len(ends) else ids
        filled: Positions = ids[ids != self.mask_id]
        return filled
