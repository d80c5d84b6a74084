"""Policies without a drift test, for comparison and as their publishers decode.

`full` is block-wise decoding (arXiv 2502.09992), `timesteps` the schedule of arXiv
2508.15487, `prefix` and `dual` Fast-dLLM's block caches (arXiv 2505.22618),
`interval` the fixed periods of dLLM-Cache (arXiv 2506.06295). No policy holds a
tensor or a slot.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from engines.config import Capacity
from engines.errors import OptionError
from runtime.decoding.policies.base import StepPlan, among, check_threshold, logits_rows, within
from runtime.decoding.sampler import Ranking
from runtime.decoding.sequence import Positions, Sequence

REMASKING = ("low_confidence", "random")
ALGORITHMS = ("maskgit_plus", "topk_margin", "entropy", "origin")


@dataclass(frozen=True)
class Blocks:
    """Decoding block by block, shared by the baselines.

    With a threshold every sufficiently confident mask of the block is
    committed; without, `steps` are spread evenly over the blocks and each
    commits a number fixed in advance. A block in which nothing is committed yet
    is new: that is when block caches are refreshed.
    """

    watches: ClassVar[bool] = False
    first_alone: ClassVar[bool] = False  # where the row before a block predicts its first mask, that one goes first
    steps: int | None = None
    block_length: int | None = None
    threshold: float | None = None
    remasking: str = "low_confidence"

    @property
    def ranking(self) -> Ranking:
        return Ranking("random" if self.remasking == "random" else "probability")

    def check(self, capacity: Capacity, gen_length: int) -> None:
        block = self.block(gen_length)
        among("remasking", self.remasking, REMASKING)
        if self.threshold is not None and self.remasking == "random":
            raise OptionError(
                "remasking random is for a fixed schedule and this one goes by a threshold, as block caches do unless "
                "told otherwise; give steps"
            )
        within("block_length", block, 1, gen_length, "gen_length")
        check_threshold(self.threshold)
        if self.steps is not None:
            within("steps", self.steps, 1, gen_length, "gen_length")
            if gen_length % block or self.steps % (gen_length // block):
                raise OptionError(
                    f"steps {self.steps} cannot be spread evenly: gen_length {gen_length} must be a multiple of "
                    f"block_length {block}, and steps of the number of blocks"
                )

    def block(self, gen_length: int) -> int:
        return min(32, gen_length) if self.block_length is None else self.block_length

    def span(self, sequence: Sequence) -> tuple[int, int]:
        """Start and end position of the first block with a mask to fill."""
        start, block = sequence.prompt_length, self.block(len(sequence) - sequence.prompt_length)
        start += (int(sequence.open[0]) - start) // block * block
        return start, min(start + block, len(sequence))

    def plan(self, sequence: Sequence, step: int, tracked: Positions) -> StepPlan:
        start, end = self.span(sequence)
        candidates = sequence.open[sequence.open < end]
        filled = int((sequence.ids[start:end] != sequence.mask_id).sum())
        active = self.rows(sequence, step, start, end, new=filled == 0)
        if active is not None:
            active = np.unique(np.concatenate([active, *logits_rows(sequence, candidates)]))
        elif self.first_alone and sequence.shift and self.threshold is not None:
            candidates = candidates[:1]
        return StepPlan(active, candidates, None if self.threshold is not None else self.commits(sequence, filled))

    def commits(self, sequence: Sequence, filled: int) -> int:
        """Commits of this step of the schedule, found from how many the block has had."""
        gen_length = len(sequence) - sequence.prompt_length
        block = self.block(gen_length)
        steps = block if self.steps is None else self.steps // (gen_length // block)
        base, more = divmod(block, steps)
        return base + 1 if filled < more * (base + 1) else base

    def rows(self, sequence: Sequence, step: int, start: int, end: int, new: bool) -> Positions | None:
        raise NotImplementedError


@dataclass(frozen=True)
class Full(Blocks):
    """Everything is computed at every step: the reference, and the plain baseline.

    With `cfg_scale` a second forward that does not see the prompt is made, and
    the logits move away from its by that factor (arXiv 2502.09992, Equation 16).
    """

    name: ClassVar[str] = "full"
    cfg_scale: float = 0.0

    def check(self, capacity: Capacity, gen_length: int) -> None:
        super().check(capacity, gen_length)
        within("cfg_scale", self.cfg_scale, 0.0, 1e6, "a factor")

    def rows(self, sequence: Sequence, step: int, start: int, end: int, new: bool) -> Positions | None:
        return None


@dataclass(frozen=True)
class Timesteps:
    """Everything is computed at every step, and any mask of the answer may be committed.

    Time runs from 1 to `eps` in `steps` equal steps; a step from t to s commits
    the share 1 - s/t of the masks (all at the last), those ranked highest by
    `alg`: the probability of the token, its lead over the second, or the negative
    entropy; `origin` takes each mask by chance. Numbers are rounded as float32
    rounds them, which decides about a mask more or less (arXiv 2508.15487).
    """

    name: ClassVar[str] = "timesteps"
    watches: ClassVar[bool] = False
    threshold: ClassVar[float | None] = None
    steps: int | None = None  # default: one for each mask
    alg: str = "maskgit_plus"
    alg_temp: float = 0.0
    eps: float = 1e-3
    cfg_scale: float = 0.0

    @property
    def ranking(self) -> Ranking:
        kinds = {"topk_margin": "margin", "entropy": "entropy", "origin": "random"}
        return Ranking(kinds.get(self.alg, "probability"), self.alg_temp, tempered=True)

    def check(self, capacity: Capacity, gen_length: int) -> None:
        if self.steps is not None:
            within("steps", self.steps, 1, 10**6, "whole steps")
        among("alg", self.alg, ALGORITHMS)
        within("alg_temp", self.alg_temp, 0.0, 1e6, "a temperature")
        within("eps", self.eps, 0.0, 1.0, "a time")
        within("cfg_scale", self.cfg_scale, 0.0, 1e6, "a factor")

    def plan(self, sequence: Sequence, step: int, tracked: Positions) -> StepPlan:
        candidates = sequence.open
        steps = self.steps or len(sequence) - sequence.prompt_length
        share = np.float32(1) if step >= steps - 1 else 1 - self.time(step + 1, steps) / self.time(step, steps)
        if self.alg == "origin":
            return StepPlan(None, candidates, None, chance=float(share))
        return StepPlan(None, candidates, int(np.float32(len(candidates)) * share))

    def time(self, step: int, steps: int) -> np.float32:
        """The time at `step`, counted from the nearer end, as float32."""
        each = (np.float32(self.eps) - np.float32(1)) / np.float32(steps)
        if step < (steps + 1) // 2:
            return np.float32(1) + each * np.float32(step)
        return np.float32(self.eps) - each * np.float32(steps - step)


@dataclass(frozen=True)
class Prefix(Blocks):
    """What lies before the block is cached while the block is filled."""

    name: ClassVar[str] = "prefix"
    first_alone: ClassVar[bool] = True

    def rows(self, sequence: Sequence, step: int, start: int, end: int, new: bool) -> Positions | None:
        return None if new else np.arange(start, len(sequence))


@dataclass(frozen=True)
class Dual(Blocks):
    """What lies before and after the block is cached while the block is filled."""

    name: ClassVar[str] = "dual"
    first_alone: ClassVar[bool] = True

    def rows(self, sequence: Sequence, step: int, start: int, end: int, new: bool) -> Positions | None:
        return None if new else np.arange(start, end)


@dataclass(frozen=True)
class Interval(Blocks):
    """Everything is refreshed every `prompt_interval` steps, the answer every `response_interval`;
    in between only the block is computed."""

    name: ClassVar[str] = "interval"
    prompt_interval: int = 50
    response_interval: int = 7

    def check(self, capacity: Capacity, gen_length: int) -> None:
        super().check(capacity, gen_length)
        within("prompt_interval", self.prompt_interval, 1, 10**9, "whole steps")
        within("response_interval", self.response_interval, 1, 10**9, "whole steps")

    def rows(self, sequence: Sequence, step: int, start: int, end: int, new: bool) -> Positions | None:
        if step % self.prompt_interval == 0:
            return None
        if step % self.response_interval == 0:
            return np.arange(sequence.prompt_length, len(sequence))
        return np.arange(start, end)
