"""Find the fastest setting of `elastic` whose answers agree with those of `full`.

The search starts at the most careful setting and moves one option at a time, for two rounds; it keeps the fastest
value that reaches the target. Two settings are timed prompt by prompt in turn, because the load of the machine may
change. The measure is the mean fraction of tokens equal to those of `full` with one commit per step, on problems that
no evaluation uses.
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
from runtime.evaluation.intervals import agreement

SEED = 20261123
ROUNDS = 2
NOISE = 0.02  # relative; a smaller gain in time does not count
# None lifts a limit, whatever the bundle's default is.
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
    """One setting's means per answer: agreement with `full`, seconds, and the fraction of layer-rows computed."""

    options: dict[str, Any]
    agreement: float
    seconds: float
    computed_fraction: float


def prompts(count: int) -> list[str]:
    """Draw `count` prompts of the task families in turn, from the training split."""
    return [problem.prompt for problem in tasks.in_turn(random.Random(SEED), "train", count)]


def calibrate(model: Runtime, target: float, prompts: list[Any], gen_length: int) -> Iterator[Trial]:
    """Yield every trial, and the chosen one once more as the last.

    Raises OptionError if even the most careful setting does not reach the target.
    """
    if not 0 < target <= 1:
        raise OptionError(f"target-agreement must lie in (0, 1], got {target}")
    if not prompts:
        raise OptionError("calibration needs at least one prompt, got none; give --prompts a file with one per line")
    expected = [model.generate(prompt, "full", gen_length=gen_length).ids for prompt in prompts]
    trials: dict[tuple[Any, ...], Trial] = {}

    def tried(options: dict[str, Any]) -> Trial:
        key = tuple(options.items())
        if key not in trials:
            outs = [model.generate(prompt, "elastic", gen_length=gen_length, **options) for prompt in prompts]
            trials[key] = judged(options, outs, expected)
        return trials[key]

    def faster(options: dict[str, Any]) -> bool:
        """Whether `options` take less time than the best so far on the median prompt, beyond noise."""
        ratios = []
        for prompt in prompts:
            ours, theirs = (
                model.generate(prompt, "elastic", gen_length=gen_length, **setting).seconds
                for setting in (options, best.options)
            )
            ratios.append(ours / theirs)
        return statistics.median(ratios) < 1 - NOISE

    best = tried(fitting(model, CAREFUL))
    yield best
    if best.agreement < target:
        raise OptionError(
            f"the most careful setting {best.options} agrees with full in {best.agreement:.2%} of the tokens, less "
            f"than {target:.2%}; lower --target-agreement, or calibrate on prompts that the model answers with more "
            "certainty"
        )
    for _ in range(ROUNDS):
        for name, values in VALUES.items():
            for value in values:
                options = best.options | {name: value}
                if options != fitting(model, options) or tuple(options.items()) in trials:
                    continue
                trial = tried(options)
                yield trial
                if trial.agreement >= target and faster(options):
                    best = trial
    yield best


def fitting(model: Runtime, options: dict[str, Any]) -> dict[str, Any]:
    """`options` within the bundle's capacity, with a limit of masks of at least two windows."""
    window = min(options["window"], model.bundle.capacity.window)
    max_masks = options["max_masks"]
    return options | {"window": window, "max_masks": None if max_masks is None else max(max_masks, 2 * window)}


def judged(options: dict[str, Any], outs: list[Output], expected: list[list[int]]) -> Trial:
    """The trial of a setting from its answers and those of `full`."""
    return Trial(
        options=options,
        agreement=statistics.fmean(agreement(out.ids, ids) for out, ids in zip(outs, expected, strict=True)),
        seconds=statistics.fmean(out.seconds for out in outs),
        computed_fraction=statistics.fmean(out.computed_fraction for out in outs),
    )


def keep(model: Runtime, target: float, trials: list[Trial], gen_length: int, count: int) -> None:
    """Write the last trial's options into the bundle as its defaults, and all trials beside them."""
    chosen = trials[-1]
    evidence = {
        "target_agreement": target, "prompts": count, "gen_length": gen_length, "backend": model.backend,
        "device": model.model.device, "chosen": asdict(chosen), "trials": [asdict(trial) for trial in trials[:-1]],
    }  # fmt: skip
    set_defaults(model.bundle.root, {"policy": "elastic"} | chosen.options, CALIBRATION, evidence)
