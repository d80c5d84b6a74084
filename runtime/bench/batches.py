"""Tokens per second of sequences decoded side by side, for several batch sizes.

The same prompts, of different lengths, are decoded in batches of every size; the sizes take turns, so that a change in
the machine's load affects all of them alike.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.api import Runtime
from runtime.bench.cases import prompts
from runtime.decoding.request import check_batch

FRACTIONS = 0.25, 0.5, 0.75, 1.0  # of the longest prompt: batches are ragged


def bench_batches(
    model: Runtime, sizes: Sequence[int], count: int, prompt_length: int, gen_length: int, rounds: int = 3
) -> list[dict[str, Any]]:
    """Measure each batch size over `count` prompts.

    The figures are tokens per second, the speed relative to the first size (median of `rounds` paired ratios), and the
    number of sequences whose tokens equal those decoded alone. Raises OptionError for a size that the bundle was not
    built for.
    """
    for size in sizes:
        check_batch(size, model.model)
    drawn = [
        next(iter(prompts(model, 1, max(1, int(prompt_length * FRACTIONS[number % len(FRACTIONS)])), seed=number)))[0]
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
