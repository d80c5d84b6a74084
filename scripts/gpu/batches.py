"""How fast TensorRT decodes several prompts side by side, and whether each gets the tokens that it gets alone."""

import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from engines.errors import ElasticError
from engines.model import Model
from engines.runner import ReusePass
from runtime.decoding.generate import Output
from scripts.gpu.report import timed
from scripts.gpu.steps import make_drift_inputs, waiting

SIZES = 1, 4, 16


def batch_figures(model: Any, sizes: Iterable[int], length: int, window: int, gen_length: int) -> dict[str, Any]:
    """Part (d), by batch size: milliseconds of a reuse pass, and figures of decoding prompts of different lengths.

    Decoding is measured without and with refreshes. A size that does not fit has its error instead, and larger ones
    are left out.
    """
    found: dict[str, Any] = {}
    rng, config = np.random.default_rng(0), model.model.config
    ordinary = min(config.mask_id, config.vocab, *config.end_ids)
    lengths = rng.integers(1, length - gen_length, max(sizes))
    prompts = [rng.integers(0, ordinary, count) for count in lengths]
    options: list[dict[str, Any]] = [
        {"gamma": gamma, "window": window, "gen_length": gen_length, "stop_at_eos": False} for gamma in (0.0, 0.9)
    ]
    alone = [[model.generate(prompt, **chosen) for prompt in prompts] for chosen in options]
    for size in sizes:
        try:
            found[str(size)] = {
                "reuse_ms": 1e3 * batched_pass(model.model, size, length, window),
                "decoding": [decoding(model, prompts, size, *case) for case in zip(options, alone, strict=True)],
            }
        except ElasticError as error:
            found[str(size)] = str(error)
            break
    return found


def batched_pass(model: Model, size: int, length: int, window: int) -> float:
    """Seconds of a reuse pass of `size` sequences."""
    runners = model.new_runners([(length, length)] * size)
    passes = [
        ReusePass(runner, runner.padded_rows, make_drift_inputs(runner, length, window), 0.0) for runner in runners
    ]
    for due in passes:
        due.runner.embed(np.ones(due.runner.slots, np.int64))
        due.runner.run_layers(due.runner.slots, due.drift_inputs)

    def reuse() -> None:
        for due in passes:
            due.runner.embed(np.ones(due.rows, np.int64))
        model.reuse(passes)

    return timed(reuse, waiting(model))


def decoding(
    model: Any, prompts: list[Any], size: int, options: dict[str, Any], alone: list[Output]
) -> dict[str, Any]:  # fmt: skip
    """Tokens per second in batches of `size`, in the second of two runs, and how many sequences are as they are alone.

    `closest` holds the smallest margin of a decision of each sequence that differs: in half precision, a small one may
    go either way.
    """
    for _ in range(2):
        began = time.perf_counter()
        outs = [
            out
            for start in range(0, len(prompts), size)
            for out in model.generate_batch(prompts[start : start + size], **options)
        ]
        seconds = time.perf_counter() - began
    others = [theirs for ours, theirs in zip(outs, alone, strict=True) if ours.sequence != theirs.sequence]
    return {
        "gamma": options["gamma"], "tokens_per_second": sum(out.tokens for out in outs) / seconds,
        "refreshes": sum(event.refreshed for out in outs for event in out.trace),
        "sequences": len(outs), "equal_to_alone": len(outs) - len(others),
        "closest": [min(event.margin for event in out.trace) for out in others],
    }  # fmt: skip
