"""States of prompt prefixes that are computed once and used by many requests.

Attention is bidirectional, so a prefix's keys and values depend on what stands behind it; its state is computed with
masks behind, in one pass that belongs to no request. A request's first pass then runs the rows behind the prefix alone.
What is kept never decides tokens: a state that is not there is computed as it would have been.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import OptionError, PromptError
from engines.model import Model
from engines.runner import PrefixState
from runtime.decoding.policies import Elastic, Policy
from runtime.decoding.request import Request
from runtime.decoding.sequence import Positions

MASKS = 128  # behind a prefix, where a bundle has no `max_masks`
Key = tuple[bytes, bytes, int]


@dataclass
class PrefixCache:
    """States by prefix, the least recently used dropped first where they need more than `budget` bytes.

    `hits` and `misses` count the requests whose state was there, or was not; `nbytes` is what is kept now. Raises
    OptionError for a negative budget.
    """

    budget: int
    hits: int = 0
    misses: int = 0

    def __post_init__(self) -> None:
        if self.budget < 0:
            raise OptionError(f"prefix_cache must be a number of bytes, not less than 0, got {self.budget}; give more")
        self.states: OrderedDict[Key, PrefixState] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.states.values())

    def state(self, model: Model, ids: Positions, embeddings: NDArray[np.float32] | None, masks: int) -> PrefixState:
        """The state of the prefix `ids` [n] with `masks` behind it, computed if it is not kept.

        The rows of `embeddings` that its ids stand for are part of its key. The state
        is valid until the next `settle`. Uses the model's memory, so ask before a
        request has a runner.
        """
        rows = np.zeros(0) if embeddings is None else embeddings[ids[ids >= model.config.vocab] - model.config.vocab]
        key = ids.tobytes(), rows.tobytes(), masks
        if key in self.states:
            self.hits += 1
            self.states.move_to_end(key)
        else:
            self.misses += 1
            self.states[key] = computed(model, ids, embeddings, masks)
        return self.states[key]

    def settle(self) -> None:
        """Drop states until the rest fits the budget."""
        while self.nbytes > self.budget:
            self.states.popitem(last=False)[1].free()

    def close(self) -> None:
        """Drop all states."""
        while self.states:
            self.states.popitem()[1].free()


def computed(model: Model, ids: Positions, embeddings: Any, masks: int) -> PrefixState:
    """The state of a prefix from one pass over it and `masks` masks."""
    length = len(ids) + masks
    runner = model.new_runner(length)
    if embeddings is not None:
        runner.set_input_embeddings(np.ascontiguousarray(embeddings, np.float32))
    rows = runner.slots if runner.padded_rows else length
    runner.embed(np.concatenate([ids, np.full(rows - len(ids), model.config.mask_id)]))
    runner.run_layers(rows, None)
    state = runner.prefix_state(len(ids))
    runner.end()
    return state


@contextmanager
def settled(prefixes: PrefixCache | None) -> Iterator[None]:
    """Bring the cache, if there is one, back to its budget after the body, an error in it or not."""
    try:
        yield
    finally:
        if prefixes is not None:
            prefixes.settle()


def check_prefix(request: Request, policy: Policy, has_cache: bool) -> None:
    """Raise OptionError or PromptError for a prefix that cannot be reused."""
    if not has_cache:
        raise OptionError("prefix has no effect without a cache; load the bundle with prefix_cache, or leave it out")
    if policy.name != Elastic.name:
        raise OptionError(f"only elastic tests a reused prefix for drift; use it in place of {policy.name}")
    if not 0 < request.prefix < len(request.prompt_ids):
        raise PromptError(
            f"prefix {request.prefix} must leave at least one of {len(request.prompt_ids)} prompt ids; give less"
        )
