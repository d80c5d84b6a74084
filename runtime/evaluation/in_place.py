"""Puzzles whose holes are filled in place, as the exact match of `runtime eval` counts them."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from engines.errors import OptionError
from runtime.api import Runtime
from runtime.decoding.sequence import Positions
from runtime.evaluation.puzzles import Puzzle, generate

SEED = 20251014


def encoded(model: Runtime, puzzle: Puzzle) -> tuple[Positions, Positions]:
    """The ids [P] of a solved puzzle and the positions [n] of its holes.

    Raises OptionError for a tokenizer that does not have a token for each word.
    """
    ids = model.text.encode(puzzle.solved, whole=True)
    start = len(model.text.start)
    known = model.text.tokenizer.get_vocab()
    if len(ids) != start + len(puzzle.words) or any(word not in known for word in puzzle.words):
        raise OptionError(
            f"the bundle's tokenizer has no token for each word of {puzzle.family}; give a bundle of "
            f"`python -m export build --checkpoint {puzzle.family}`"
        )
    return ids, start + np.array(puzzle.holes)


def runs(
    model: Runtime, family: str, limit: int, policy: str | None, options: dict[str, Any], few_shot: int = 0
) -> Iterator[Callable[[], dict[str, Any]]]:
    """For each of the first `limit` held-out puzzles a function that fills its holes and returns the result.

    Raises OptionError for few-shot prompts, which puzzles do not have, and as `encoded`.
    """
    if few_shot:
        raise OptionError(f"few_shot puts solved problems before a prompt, and {family} has none; leave it out")
    rng = random.Random(f"{SEED}/{family}")
    for _ in range(limit):
        ids, holes = encoded(model, generate(family, rng, "test"))
        yield lambda ids=ids, holes=holes: filled(model, ids, holes, policy, options)  # type: ignore[misc]


def filled(
    model: Runtime, solved: Positions, holes: Positions, policy: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    """The result of filling the `holes` [n] of a puzzle whose ids are `solved` [P]; correct if all are those."""
    ids = solved.copy()
    ids[holes] = model.bundle.config.mask_id
    out = model.fill(ids, policy=policy, **options).output
    return {
        "correct": out.sequence == solved.tolist(), "steps": out.steps, "tokens": len(holes), "seconds": out.seconds,
        "computed_fraction": out.computed_fraction, "ids": np.array(out.sequence)[holes].tolist(),
    }  # fmt: skip
