"""Block-wise policies without a drift test, as their authors decode.

`full` is LLaDA's own decoding (arXiv 2502.09992), `prefix` and `dual` are the block
caches of Fast-dLLM (arXiv 2505.22618), `interval` has the fixed refresh periods of
dLLM-Cache (arXiv 2506.06295).
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from engines.config import Capacity
from engines.errors import OptionError
from engines.options import check_options, listed, option
from runtime.decoding.policies.base import PolicyOptions, StepPlan, shifted_rows
from runtime.decoding.sampler import Ranking
from runtime.decoding.sequence import Positions, Sequence

REMASKING = ("low_confidence", "random")
BLOCK_LENGTH = 32  # of blocks where no other length is given


@dataclass(frozen=True)
class Blocks(PolicyOptions):
    """Decoding block by block, shared by the policies of this module.

    With a threshold every sufficiently confident mask of the block is committed;
    without, `steps` are spread evenly over the blocks and each commits a number
    fixed in advance. A block in which no token is committed yet is new: block
    caches are refreshed then.
    """

    steps: int | None = option(None, "steps of the fixed schedule; none: one per mask", low=1)
    block_length: int | None = option(None, f"masks of a block; none: {BLOCK_LENGTH}, or the answer's length", low=1)
    threshold: float | None = option(
        None, "confidence from which a token is committed; none: a fixed schedule", low=0, high=1, above=True,
        reason="a probability", excludes=("steps",),
    )  # fmt: skip
    remasking: str = option("low_confidence", "what a fixed schedule ranks masks by", choices=REMASKING)

    @property
    def ranking(self) -> Ranking:
        """By the token's probability, or at random."""
        return Ranking("random" if self.remasking == "random" else "probability")

    def check(self, capacity: Capacity, gen_length: int) -> None:
        """Raise OptionError for an option out of range, or a schedule that does not fit the blocks."""
        check_options(self, {"block_length": (gen_length, "gen_length"), "steps": (gen_length, "gen_length")})
        if self.threshold is not None and self.remasking == "random":
            raise OptionError(
                "remasking random is for a fixed schedule and this one commits by a threshold, the default of block "
                "caches; give steps"
            )
        block = self.block(gen_length)
        if self.steps is not None and (gen_length % block or self.steps % (gen_length // block)):
            raise OptionError(
                f"steps {self.steps} cannot be spread evenly: gen_length {gen_length} must be a multiple of "
                f"block_length {block}, and steps of the number of blocks"
            )

    def block(self, gen_length: int) -> int:
        """Masks of a block in an answer of `gen_length` masks."""
        return min(BLOCK_LENGTH, gen_length) if self.block_length is None else self.block_length

    def plan(self, sequence: Sequence, step: int, tracked: Positions) -> StepPlan:
        """The masks of the first block that has one."""
        start, end = self._span(sequence)
        candidates = sequence.open[sequence.open < end]
        masked = sequence.masked
        filled = sequence.masks_of(start, end) - int(((masked >= start) & (masked < end)).sum())
        active = self.rows(sequence, step, start, end, new=filled == 0)
        if active is not None:
            active = np.unique(np.concatenate([active, *shifted_rows(sequence, candidates)]))
        commits = None if self.threshold is not None else self._commits(sequence, sequence.masks_of(start, end), filled)
        return StepPlan(active=active, candidates=candidates, commits=commits, threshold=self.threshold)

    def _span(self, sequence: Sequence) -> tuple[int, int]:
        """Start and end position of the first block with a mask to fill."""
        start, block = sequence.prompt_length, self.block(sequence.span)
        start += (int(sequence.open[0]) - start) // block * block
        return start, min(start + block, len(sequence))

    def _commits(self, sequence: Sequence, masks: int, filled: int) -> int:
        """Commits of this step of the schedule, from how many of the block's `masks` are filled already."""
        block = self.block(sequence.span)
        steps = block if self.steps is None else self.steps // (sequence.span // block)
        base, more = divmod(masks, steps)
        return base + 1 if filled < more * (base + 1) else base

    def rows(self, sequence: Sequence, step: int, start: int, end: int, new: bool) -> Positions | None:
        """The rows that a step in the block `start` … `end` - 1 computes, None for all; `new`: its first step."""
        raise NotImplementedError


@dataclass(frozen=True)
class Full(Blocks):
    """Everything is computed at every step: the reference, and the baseline without a cache."""

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "everything: decoding as published (arXiv 2502.09992), and the baseline"

    cfg_scale: float = option(0.0, "scale of classifier-free guidance", low=0.0, high=1e6, reason="a factor")
    grow: bool = option(False, "masks of a block are appended when the block before is filled")
    end_think_token_ids: tuple[int, ...] | None = option(None, "ids that end a thinking part, to be boosted", low=0)
    end_think_logit_boost: float = option(
        0.0, "most that is added to the logit of the next of these ids", low=0.0, high=1e6, reason="a logit"
    )
    end_think_boost_power: float = option(
        1.0, "power of the filled share of the answer that the boost grows by", low=0.0, high=100.0, reason="a power"
    )  # fmt: skip

    @property
    def whole_blocks(self) -> bool:  # type: ignore[override]
        """With `grow` the answer ends with a block."""
        return self.grow

    def masks_to_append(self, sequence: Sequence) -> int:
        """All that remain; with `grow` those of one block, when none is open."""
        if not self.grow:
            return sequence.remaining
        return 0 if len(sequence.open) else self.block(sequence.total - sequence.prompt_length)

    def plan(self, sequence: Sequence, step: int, tracked: Positions) -> StepPlan:
        """As `Blocks.plan`, with guidance and the boost of the end of thinking."""
        plan = super().plan(sequence, step, tracked)
        return replace(plan, guidance=self.cfg_scale, boost=self._boost(sequence, int(plan.candidates[0])))

    def _boost(self, sequence: Sequence, first: int) -> tuple[int, float] | None:
        """The id that goes on with `end_think_token_ids` at the mask `first`, and what is added to its logit.

        None without these ids, or where the answer has them already.
        """
        wanted, answer = list(listed(self.end_think_token_ids)), sequence.ids[sequence.prompt_length :].tolist()
        if not wanted or not self.end_think_logit_boost or find(answer, wanted):
            return None
        before = answer[: first - sequence.prompt_length]
        begun = max((n for n in range(1, len(wanted)) if before[-n:] == wanted[:n]), default=0)
        share = min(1.0, (len(before) + 1) / (sequence.total - sequence.prompt_length))
        return wanted[begun], self.end_think_logit_boost * share**self.end_think_boost_power

    def rows(self, sequence: Sequence, step: int, start: int, end: int, new: bool) -> Positions | None:
        """All rows."""
        return None


def find(ids: list[int], wanted: list[int]) -> bool:
    """Whether `wanted` follow one another somewhere in `ids`."""
    return any(ids[start : start + len(wanted)] == wanted for start in range(len(ids) - len(wanted) + 1))


@dataclass(frozen=True)
class CachedBlocks(Blocks):
    """Blocks with a cache: by a threshold unless steps are given."""

    threshold: float | None = option(
        0.9, "confidence from which a token is committed; none: a fixed schedule", low=0, high=1, above=True,
        reason="a probability", excludes=("steps",),
    )  # fmt: skip


@dataclass(frozen=True)
class BlockCache(CachedBlocks):
    """A cache that is refreshed at the first step of each block."""

    def plan(self, sequence: Sequence, step: int, tracked: Positions) -> StepPlan:
        """As `Blocks.plan`; where the row before a block predicts its first mask, that mask is predicted alone."""
        plan = super().plan(sequence, step, tracked)
        if plan.active is None and sequence.shift and self.threshold is not None:
            return StepPlan(active=None, candidates=plan.candidates[:1], threshold=self.threshold)
        return plan


@dataclass(frozen=True)
class Prefix(BlockCache):
    """The positions before the block are cached while the block is filled."""

    name: ClassVar[str] = "prefix"
    title: ClassVar[str] = "the block and everything after it; everything at block boundaries (Fast-dLLM)"

    def rows(self, sequence: Sequence, step: int, start: int, end: int, new: bool) -> Positions | None:
        """The block and what follows it; all at its first step."""
        return None if new else np.arange(start, len(sequence))


@dataclass(frozen=True)
class Dual(BlockCache):
    """The positions before and after the block are cached while the block is filled."""

    name: ClassVar[str] = "dual"
    title: ClassVar[str] = "the block; everything at block boundaries (Fast-dLLM)"

    def rows(self, sequence: Sequence, step: int, start: int, end: int, new: bool) -> Positions | None:
        """The block; all at its first step."""
        return None if new else np.arange(start, end)


@dataclass(frozen=True)
class Interval(CachedBlocks):
    """Everything is refreshed every `prompt_interval` steps, the answer every `response_interval` steps."""

    name: ClassVar[str] = "interval"
    title: ClassVar[str] = "the block; everything at fixed periods (after dLLM-Cache)"

    prompt_interval: int = option(50, "steps between refreshes of everything", low=1, high=10**9, reason="whole steps")
    response_interval: int = option(7, "steps between refreshes of the answer", low=1, high=10**9, reason="whole steps")

    def rows(self, sequence: Sequence, step: int, start: int, end: int, new: bool) -> Positions | None:
        """The block; the answer, or all, where a period ends."""
        if step % self.prompt_interval == 0:
            return None
        if step % self.response_interval == 0:
            return np.arange(sequence.prompt_length, len(sequence))
        return np.arange(start, end)
