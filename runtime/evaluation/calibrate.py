"""Finding the cheapest setting of `elastic` that answers as `full` does.

Every option is moved by itself, in turn, from the most careful setting, and the
fastest value that keeps the target stays; two rounds. Two settings are timed
prompt by prompt, in turn, because the machine may be noisy. The yardstick is the
mean share of tokens equal to those of `full` with one commit per step, on
problems that no evaluation uses.
"""

import random
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from engines.bundle import CALIBRATION, set_defaults
from engines.errors import OptionError
from runtime.api import Runtime
from runtime.decoding.generate import Output
from runtime.evaluation import tasks
from runtime.evaluation.exact_match import STEPS
from runtime.evaluation.intervals import agreement

SEED = 20261123
ROUNDS = 2
NOISE = 0.02
CAREFUL: dict[str, Any] = {"threshold": 0.995, "gamma": 0.99, "window": 16, "max_masks": None, "window_span": 16}
VALUES: dict[str, tuple[Any, ...]] = {
    "window_span": (None, 8, 12, 16, 24, 32),
    "max_masks": (None, 256, 192, 128, 96, 64),
    "gamma": (0.99, 0.98, 0.95, 0.9, 0.8, 0.5),
    "window": (4, 8, 12, 16, 24, 32),
    "threshold": (0.995, 0.99, 0.98, 0.97, 0.95, 0.9, 0.8),
}


@dataclass(frozen=True)
class Trial:
    """One setting: mean agreement with `full`, and seconds and share of layer-rows of an answer."""

    options: dict[str, Any]
    agreement: float
    seconds: float
    computed_fraction: float


def prompts(count: int) -> list[str]:
    """Prompts of the task families in turn, from the part that is for training."""
    rng = random.Random(SEED)
    families = [tasks.FAMILIES[number % len(tasks.FAMILIES)] for number in range(count)]
    return [tasks.generate(family, rng, "train", rng.randint(*STEPS[family])).prompt for family in families]


def calibrate(model: Runtime, target: float, asked: list[Any], gen_length: int) -> Iterator[Trial]:
    """Yield every trial; the last is the one chosen. Raises OptionError where even the most careful falls short."""
    if not 0 < target <= 1:
        raise OptionError(f"target-agreement must lie in (0, 1], got {target}")
    if not asked:
        raise OptionError("there is nothing to calibrate on: give at least one prompt")
    expected = [model.generate(prompt, "full", gen_length=gen_length).ids for prompt in asked]
    known: dict[tuple[Any, ...], Trial] = {}

    def tried(options: dict[str, Any]) -> Trial:
        key = tuple(options.items())
        if key not in known:
            outs = [model.generate(prompt, "elastic", gen_length=gen_length, **whole(options)) for prompt in asked]
            known[key] = judged(options, outs, expected)
        return known[key]

    def faster(options: dict[str, Any]) -> bool:
        """Whether the median prompt takes less time with `options` than with the best so far, beyond noise."""
        ratios = []
        for prompt in asked:
            ours, theirs = (
                model.generate(prompt, "elastic", gen_length=gen_length, **whole(way)).seconds
                for way in (options, best.options)
            )
            ratios.append(ours / theirs)
        return statistics.median(ratios) < 1 - NOISE

    best = tried(fitting(model, CAREFUL))
    yield best
    if best.agreement < target:
        raise OptionError(
            f"even {best.options} agrees with full in {best.agreement:.2%} of the tokens, less than {target:.2%}: "
            "lower --target-agreement, or calibrate on prompts that the model answers with more certainty"
        )
    for _ in range(ROUNDS):
        for name, values in VALUES.items():
            for value in values:
                options = best.options | {name: value}
                if options != fitting(model, options) or tuple(options.items()) in known:
                    continue
                trial = tried(options)
                yield trial
                if trial.agreement >= target and faster(options):
                    best = trial
    yield best


def whole(options: dict[str, Any]) -> dict[str, Any]:
    """Options as a request: None means no limit, whatever the bundle's default is."""
    return options | {name: options[name] or 10**9 for name in ("max_masks", "window_span")}


def fitting(model: Runtime, options: dict[str, Any]) -> dict[str, Any]:
    """`options` within the bundle's capacity, with a horizon of at least two windows."""
    window = min(options["window"], model.bundle.capacity.window)
    max_masks = options["max_masks"]
    return options | {"window": window, "max_masks": None if max_masks is None else max(max_masks, 2 * window)}


def judged(options: dict[str, Any], outs: list[Output], expected: list[list[int]]) -> Trial:
    count = len(outs)
    same = sum(agreement(out.ids, ids) for out, ids in zip(outs, expected, strict=True)) / count
    return Trial(
        options, same, sum(out.seconds for out in outs) / count, sum(out.computed_fraction for out in outs) / count
    )


def keep(model: Runtime, target: float, trials: list[Trial], gen_length: int, count: int) -> None:
    """Write the last trial's options into the bundle as its defaults, and all trials as the evidence."""
    chosen = trials[-1]
    evidence = {
        "target_agreement": target, "prompts": count, "gen_length": gen_length, "backend": model.backend,
        "device": model.model.device, "chosen": asdict(chosen), "trials": [asdict(trial) for trial in trials[:-1]],
    }  # fmt: skip
    set_defaults(model.bundle.root, {"policy": "elastic"} | chosen.options, CALIBRATION, evidence)
