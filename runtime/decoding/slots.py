"""Which position lies in which slot: the active set always occupies the first slots.

Attention does not depend on the order of the keys, so the active rows need not be
gathered: the few rows that enter and leave the active set swap places. `SlotMap`
plans the moves; the back end's runner carries them out.
"""

import numpy as np

from engines.runner import Slots
from runtime.decoding.sequence import Positions


class SlotMap:
    """A permutation of `length` positions over as many slots, the identity at first."""

    def __init__(self, length: int):
        self.slot_of: Slots = np.arange(length)
        self.position_at: Positions = np.arange(length)

    def arrange(self, position_at: Positions) -> None:
        """Let slot s hold position `position_at[s]`, of as many as there are."""
        self.position_at = position_at.copy()
        self.slot_of = np.argsort(position_at)

    def grow(self, length: int) -> None:
        """Extend the map to at least `length` positions; each new one lies in the slot of its own number."""
        more = np.arange(len(self.slot_of), length)
        self.slot_of, self.position_at = np.append(self.slot_of, more), np.append(self.position_at, more)

    def bring_to_front(self, positions: Positions) -> tuple[Slots, Slots]:
        """Make `positions` [n] occupy the first n slots; returns the moves (targets, sources), slots of equal number.

        Rows that are among the first n already stay; each other one swaps with a
        row that is not wanted there.
        """
        count = len(positions)
        slots = self.slot_of[positions]
        arriving = np.sort(slots[slots >= count])
        free = np.ones(count, bool)
        free[slots[slots < count]] = False
        leaving = np.flatnonzero(free)
        target, source = np.concatenate([leaving, arriving]), np.concatenate([arriving, leaving])
        self.position_at[target] = self.position_at[source]
        self.slot_of[self.position_at[target]] = target
        return target, source
