"""Tokens per second of sequences decoded side by side, against how many they are.

The same prompts, of different lengths, are decoded in batches of every size, and
the sizes take turns, so that a noisy machine troubles all alike. Nothing here
knows a back end by name.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from engines.errors import OptionError
from runtime.api import Runtime
from runtime.bench.cases import prompts

SHARES = 0.25, 0.5, 0.75, 1.0  # of the longest prompt: batches are ragged


def throughput(
    model: Runtime, sizes: Sequence[int], count: int, prompt_length: int, gen_length: int, rounds: int = 3
) -> list[dict[str, Any]]:
    """Figures of each batch size over `count` prompts: tokens per second, the ratio to the first size (the median of
    `rounds` paired ones), and how many sequences have the tokens that they have alone.

    Raises OptionError for a size that the bundle was not built for.
    """
    for size in sizes:
        check_size(size, model.bundle.capacity.max_batch)
    drawn = [
        next(iter(prompts(model, 1, max(1, int(prompt_length * SHARES[number % len(SHARES)])), seed=number)))[0]
        for number in range(count)
    ]
    alone = [model.generate(prompt, gen_length=gen_length) for prompt in drawn]
    tokens = sum(out.tokens for out in alone)
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    equal = {}
    for _ in range(rounds):
        for size in sizes:
            began = time.perf_counter()
            outs = [
                out
                for start in range(0, count, size)
                for out in model.generate_batch(drawn[start : start + size], gen_length=gen_length)
            ]
            seconds[size].append(time.perf_counter() - began)
            equal[size] = sum(ours.sequence == theirs.sequence for ours, theirs in zip(outs, alone, strict=True))
    first = np.array(seconds[sizes[0]])
    return [
        {
            "backend": model.backend, "batch": size, "sequences": count, "equal_to_alone": equal[size],
            "tokens_per_second": tokens / statistics.median(seconds[size]),
            "times_faster": float(np.median(first / np.array(seconds[size]))),
        }
        for size in sizes
    ]  # fmt: skip


def check_size(size: int, limit: int) -> None:
    if not 1 <= size <= limit:
        raise OptionError(f"a batch of {size} is not in 1 … {limit}; build with a larger --max-batch")
