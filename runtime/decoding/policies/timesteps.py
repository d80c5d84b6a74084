"""Dream's own decoding: a schedule of time steps over the whole answer (arXiv 2508.15487)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from engines.config import Capacity
from engines.options import check_options, option
from runtime.decoding.policies.base import PolicyOptions, StepPlan
from runtime.decoding.sampler import Ranking
from runtime.decoding.sequence import Positions, Sequence

ALGORITHMS = ("maskgit_plus", "topk_margin", "entropy", "origin")


@dataclass(frozen=True)
class Timesteps(PolicyOptions):
    """Everything is computed at every step, and any mask of the answer may be committed.

    Time runs from 1 to `eps` in `steps` equal steps; a step from t to s commits
    the fraction 1 - s/t of the masks (all of them at the last step): those ranked
    highest by `alg`, which is the probability of the token (maskgit_plus), its
    lead over the second (topk_margin) or the negative entropy (entropy). `origin`
    commits each mask with that probability. Numbers are rounded as float32, as in
    the published code: rounding can change the number of commits by one.
    """

    name: ClassVar[str] = "timesteps"
    title: ClassVar[str] = "everything; any mask of the answer, in a fixed number of time steps (arXiv 2508.15487)"
    bundle_defaults: ClassVar[bool] = True

    steps: int | None = option(None, "time steps; none: one per mask", low=1, high=10**6, reason="whole steps")
    alg: str = option("maskgit_plus", "what masks are ranked by", choices=ALGORITHMS)
    alg_temp: float = option(0.0, "temperature of drawing masks by rank", low=0.0, high=1e6, reason="a temperature")
    eps: float = option(1e-3, "time of the last step", low=0.0, high=1.0, reason="a time")
    cfg_scale: float = option(0.0, "scale of classifier-free guidance", low=0.0, high=1e6, reason="a factor")

    @property
    def ranking(self) -> Ranking:
        """The ranking that `alg` names, of the probabilities after temperature, top-k and top-p."""
        kinds = {"topk_margin": "margin", "entropy": "entropy", "origin": "random"}
        return Ranking(kinds.get(self.alg, "probability"), self.alg_temp, tempered=True)

    def check(self, capacity: Capacity, gen_length: int) -> None:
        """Raise OptionError for an option out of range."""
        check_options(self)

    def plan(self, sequence: Sequence, step: int, tracked: Positions) -> StepPlan:
        """All masks are candidates; their number and the time that passes give the commits."""
        candidates = sequence.open
        steps = self.steps or sequence.masks_of(sequence.prompt_length, len(sequence))
        last = step >= steps - 1
        fraction = np.float32(1) if last else 1 - self._time(step + 1, steps) / self._time(step, steps)
        if self.alg == "origin":
            return StepPlan(active=None, candidates=candidates, chance=float(fraction), guidance=self.cfg_scale)
        commits = int(np.float32(len(candidates)) * fraction)
        return StepPlan(active=None, candidates=candidates, commits=commits, guidance=self.cfg_scale)

    def _time(self, step: int, steps: int) -> np.float32:
        """The time at `step`, counted from the nearer end, as float32."""
        each = (np.float32(self.eps) - np.float32(1)) / np.float32(steps)
        if step < (steps + 1) // 2:
            return np.float32(1) + each * np.float32(step)
        return np.float32(self.eps) - each * np.float32(steps - step)
