"""Find the fastest setting of `elastic` whose answers are those of `full`, and confirm it on other prompts.

On one half of the prompts the search starts at the most careful setting and moves one option at a time, for two
rounds; it keeps the fastest value that reaches the target. Two settings are timed prompt by prompt in turn, because the
load of the machine may change. The measure is the fraction of answers equal, token for token, to those of `full` with
one commit per step, on problems that no evaluation uses: tokens alone would hide much, as one wrong token can make an
answer wrong. The other half confirms: the setting must reach the target there too, and be faster than the bundle's
defaults beyond noise, or else these stay.
"""

import math
import random
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.bundle import Bundle
from engines.defaults import CALIBRATION, evidence, set_defaults
from engines.errors import OptionError
from engines.options import options_of
from runtime.api import Runtime
from runtime.decoding.policies.elastic import Elastic
from runtime.evaluation import tasks
from runtime.evaluation.intervals import agreement

SEED = 20261123
LEAST = 20  # prompts, half of them to confirm
ROUNDS = 2
NOISE = 0.02  # relative; a smaller gain in time does not count
CHANCE = 0.05  # probability from which a gain in time may be chance
# None lifts a limit, whatever the bundle's default is.
CAREFUL: dict[str, Any] = {
    "policy": Elastic.name, "threshold": 0.995, "gamma": 0.99, "window": 16, "max_masks": None, "window_span": 16,
    "refresh_start": "next",
}  # fmt: skip
VALUES: dict[str, tuple[Any, ...]] = {
    "window_span": (None, 8, 12, 16, 24, 32),
    "max_masks": (None, 256, 192, 128, 96, 64),
    "gamma": (0.99, 0.98, 0.95, 0.9, 0.8, 0.5),
    "refresh_start": ("next", "first"),
    "window": (4, 8, 12, 16, 24, 32),
    "threshold": (0.995, 0.99, 0.98, 0.97, 0.95, 0.9, 0.8),
}


@dataclass(frozen=True)
class Trial:
    """A setting on one half of the prompts, "search" or "confirmation".

    `agreement` is the fraction of answers equal to those of `full`, `tokens` the mean fraction of equal tokens;
    `seconds` and the fraction of layer-rows computed are means per answer.
    """

    half: str
    options: dict[str, Any]
    agreement: float
    tokens: float
    seconds: float
    computed_fraction: float


class Half:
    """One half of the prompts, and the answers that `full` gives to them."""

    def __init__(self, name: str, model: Runtime, prompts: list[Any], gen_length: int):
        self.name, self.model, self.prompts, self.gen_length = name, model, prompts, gen_length
        self.expected = [model.generate(prompt, "full", gen_length=gen_length).ids for prompt in prompts]

    def trial(self, options: dict[str, Any]) -> Trial:
        """Answer every prompt with a setting."""
        outs = [self.model.generate(prompt, gen_length=self.gen_length, **options) for prompt in self.prompts]
        both = [(out.ids, ids) for out, ids in zip(outs, self.expected, strict=True)]
        return Trial(
            half=self.name, options=options, agreement=statistics.fmean(ours == theirs for ours, theirs in both),
            tokens=statistics.fmean(agreement(ours, theirs) for ours, theirs in both),
            seconds=statistics.fmean(out.seconds for out in outs),
            computed_fraction=statistics.fmean(out.computed_fraction for out in outs),
        )  # fmt: skip

    def ratios(self, options: dict[str, Any], others: dict[str, Any]) -> list[float]:
        """Seconds with `options` over seconds with `others`, measured in turn, for each prompt."""
        found = []
        for prompt in self.prompts:
            ours, theirs = (
                self.model.generate(prompt, gen_length=self.gen_length, **setting).seconds
                for setting in (options, others)
            )
            found.append(ours / theirs)
        return found


def prompts(count: int) -> list[str]:
    """Draw `count` prompts of the task families in turn, from the training split."""
    return [problem.prompt for problem in tasks.in_turn(random.Random(SEED), "train", count)]


def check(target: float, prompts: list[Any]) -> None:
    """Raise OptionError for a target that is no fraction, or fewer than LEAST prompts."""
    if not 0 < target <= 1:
        raise OptionError(f"target-agreement must lie in (0, 1], got {target}")
    if len(prompts) < LEAST:
        raise OptionError(
            f"calibration needs at least {LEAST} prompts, half of them to confirm, got {len(prompts)}; "
            "give --prompts a file with more, one per line, and --limit no less"
        )


def calibrate(model: Runtime, target: float, prompts: list[Any], gen_length: int) -> Iterator[Trial]:
    """Yield every trial, and that of the chosen setting on the confirming half once more as the last.

    Raises OptionError as `check` does, and where neither a setting that was found nor the bundle's defaults reach the
    target on both halves.
    """
    check(target, prompts)
    drawn = random.Random(SEED).sample(prompts, len(prompts))
    middle = len(drawn) // 2
    search = Half("search", model, drawn[:middle], gen_length)
    path: list[Trial] = []  # each faster than the one before
    for trial, is_better in searched(search, target, fitting(model, CAREFUL)):
        yield trial
        path += [trial] * is_better
    confirmation = Half("confirmation", model, drawn[middle:], gen_length)
    old = defaults(model)
    before = [half.trial(old) for half in (search, confirmation)]
    yield from before
    stays = before[-1] if all(trial.agreement >= target for trial in before) else None
    found = None
    while path and found is None:
        trial = confirmation.trial(path.pop().options)
        yield trial
        found = trial if trial.agreement >= target else None
    if found is None and stays is None:
        raise OptionError(
            f"no setting answers as full does in {target:.1%} of the prompts of both halves, and the bundle's defaults "
            f"do in {before[0].agreement:.1%} and {before[1].agreement:.1%}; lower --target-agreement, or calibrate on "
            "prompts that the model answers with more certainty"
        )
    if found is None or (stays is not None and not clearly_faster(confirmation.ratios(found.options, old))):
        found = stays
    assert found is not None
    yield found


def searched(half: Half, target: float, careful: dict[str, Any]) -> Iterator[tuple[Trial, bool]]:
    """Yield each trial of the search, and whether it reaches the target and is faster than all before that do."""
    best = half.trial(careful)
    yield best, best.agreement >= target
    if best.agreement < target:
        return
    seen = {tuple(careful.items())}
    for _ in range(ROUNDS):
        for name, values in VALUES.items():
            for value in values:
                options = best.options | {name: value}
                if options != fitting(half.model, options) or tuple(options.items()) in seen:
                    continue
                seen.add(tuple(options.items()))
                trial = half.trial(options)
                is_better = trial.agreement >= target and (
                    statistics.median(half.ratios(options, best.options)) < 1 - NOISE
                )
                best = trial if is_better else best
                yield trial, is_better


def clearly_faster(ratios: list[float]) -> bool:
    """Whether so many `ratios` of seconds are below 1, beyond noise, that chance is improbable (a sign test)."""
    count = len(ratios)
    below = sum(ratio < 1 - NOISE for ratio in ratios)
    ways = sum(math.comb(count, number) for number in range(below, count + 1))
    return ways * 0.5**count < CHANCE


def defaults(model: Runtime) -> dict[str, Any]:
    """The bundle's default policy, and its options (of `elastic` those that calibration sets)."""
    policy, _ = model.resolve(None, {})
    names = VALUES if isinstance(policy, Elastic) else options_of(type(policy))
    return {"policy": policy.name} | {name: getattr(policy, name) for name in names}


def fitting(model: Runtime, options: dict[str, Any]) -> dict[str, Any]:
    """`options` within the bundle's capacity, with a limit of masks of at least two windows."""
    window = min(options["window"], model.bundle.capacity.window)
    max_masks = options["max_masks"]
    return options | {"window": window, "max_masks": None if max_masks is None else max(max_masks, 2 * window)}


def keep(model: Runtime, target: float, trials: list[Trial], gen_length: int, count: int) -> None:
    """Make the last trial's setting the bundle's default, and keep all trials and the defaults before in the bundle."""
    chosen, manifest = trials[-1], model.bundle.manifest
    measured = {
        "target_agreement": target, "prompts": count, "gen_length": gen_length, "backend": model.backend,
        "device": model.model.device, "chosen": asdict(chosen), "trials": [asdict(trial) for trial in trials[:-1]],
        "before": {"defaults": manifest.defaults, "evidence": evidence(model.bundle)},
    }  # fmt: skip
    changed = {} if chosen.options == defaults(model) else chosen.options
    set_defaults(model.bundle.root, changed, CALIBRATION, measured)


def undo(root: Path) -> dict[str, Any]:
    """Take back a bundle's last calibration; returns the defaults that hold again.

    Raises OptionError where there is none, BundleError if `root` is no bundle or cannot be written.
    """
    before = evidence(Bundle.open(root)).get("before")
    if before is None:
        raise OptionError(f"{root} holds no calibration to undo")
    set_defaults(root, before["defaults"], CALIBRATION, before["evidence"], whole=True)
    found: dict[str, Any] = before["defaults"]
    return found
