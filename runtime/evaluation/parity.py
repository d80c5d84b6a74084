"""End-to-end parity: the tokens, triggers and commits of a back end against eager PyTorch.

Where two runs diverge, the margins of the eager run's decisions separate float noise from error: a commit within NOISE
of the threshold, or a sigma within NOISE of gamma, may fall on either side.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.errors import OptionError, ParityError
from engines.options import values_of, within
from engines.registry import REFERENCE
from runtime.api import load
from runtime.decoding.generate import Output
from runtime.decoding.policies import fitting
from runtime.evaluation.intervals import agreement

NOISE = 1e-4


MOST = 10_000  # prompts


@dataclass(frozen=True)
class Runs:
    """The runs of one policy on two back ends: `diverged` of them differ within float noise.

    `agreement` is the mean fraction of equal tokens. Quantised weights (`weights`: int8 or int4) are not judged.
    """

    policy: str
    runs: int
    diverged: int
    agreement: float
    weights: str | None

    def __str__(self) -> str:
        if self.weights:
            equal = f"{self.agreement:.1%} of tokens equal to full-precision weights"
            return f"{self.policy}: {equal} ({self.weights} is not judged)"
        equal = f"{self.runs - self.diverged} of {self.runs} runs equal"
        return f"{self.policy}: {equal}, {self.diverged} diverge within {NOISE:g}"


def verify(
    bundle: Path, backend: str, prompts: int, seed: int = 0, done: Callable[[int], None] = lambda number: None
) -> Iterator[Runs]:
    """Yield the runs of each policy; raises ParityError if some diverge beyond float noise.

    `done` is called with the number of finished prompts, over all policies.
    """
    if backend == REFERENCE:
        raise OptionError(f"{REFERENCE} is the reference of the comparison; verify another back end")
    within("prompts", prompts, 1, MOST, "of each policy")
    with load(bundle, backend) as model, load(bundle, REFERENCE) as reference:
        config, capacity = model.bundle.config, model.bundle.capacity
        rng = np.random.default_rng(seed)
        special = {config.mask_id, *config.end_ids}
        allowed = np.array([i for i in range(config.vocab) if i not in special])
        length = min(24, capacity.max_length // 2)
        runs = {name: [rng.choice(allowed, length) for _ in range(prompts)] for name in fitting(config)}
        weights = model.bundle.manifest.engines.get(model.backend, {}).get("weights")
        finished = 0
        for policy, drawn in runs.items():
            diverged, equal = 0, 0.0
            for prompt in drawn:
                done(finished)
                finished += 1
                options: dict[str, Any] = {"gen_length": length, "policy": policy}
                ours, theirs = model.generate(prompt, **options), reference.generate(prompt, **options)
                equal += agreement(ours.ids, theirs.ids) / len(drawn)
                step = first_difference(ours, theirs)
                if step is None or weights:
                    continue
                gamma = values_of(reference.resolve(policy, {})[0]).get("gamma", 0.0)
                margin = decision_margin(theirs, step, gamma)
                if margin > NOISE:
                    raise ParityError(
                        f"{backend} and {REFERENCE} diverge at step {step} of policy {policy}, where the smallest "
                        f"margin of a decision is {margin:.2g}; check the parts with `python -m export verify {bundle}`"
                    )
                diverged += 1
            yield Runs(policy, prompts, diverged, equal, weights)
        done(finished)


def first_difference(ours: Output, theirs: Output) -> int | None:
    """The first step at which two runs differ in trigger, commits or tokens."""
    for a, b in zip(ours.trace, theirs.trace, strict=False):
        if (a.trigger, a.committed, a.tokens, a.tracked) != (b.trigger, b.committed, b.tokens, b.tracked):
            return b.step
    return None if ours.sequence == theirs.sequence else min(len(ours.trace), len(theirs.trace))


def decision_margin(run: Output, step: int, gamma: float) -> float:
    """The smallest margin of a decision in the trace, up to and including `step`; `gamma` is the drift test's."""
    distances = [1.0]
    for event in run.trace[: step + 1]:
        distances += [abs(sigma - gamma) for sigma in event.sigma]
        distances.append(event.margin)
    return min(distances)
