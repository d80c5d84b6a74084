"""Block diffusion: decoding of models whose attention is block-causal (SDAR, LLaDA2.0)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from engines.config import Capacity, ModelConfig
from engines.errors import OptionError
from engines.options import check_options, option, within
from runtime.decoding.policies.base import PolicyOptions, StepPlan
from runtime.decoding.sampler import Ranking
from runtime.decoding.sequence import Positions, Sequence


@dataclass(frozen=True)
class Block(PolicyOptions):
    """Blocks are filled one by one over an exact cache: no row sees a key behind its own block.

    Blocks are counted from position 0, so the first may begin with the end of the
    prompt. A step runs the rows of its block alone; the first step of a block also
    those of the block before, whose last tokens are not in the cache yet, and the
    first of all the whole prompt. A step commits its share of `steps` evenly spread
    over a block; with a threshold all masks whose confidence exceeds it, if they are more.
    """

    name: ClassVar[str] = "block"
    title: ClassVar[str] = "the block, over an exact cache of those before: block diffusion, for block-causal attention"
    bundle_defaults: ClassVar[bool] = True
    block_causal: ClassVar[bool] = True
    whole_blocks: ClassVar[bool] = True

    block_length: int | None = option(None, "positions of a block; none: the model's own", low=1)
    steps: int | None = option(None, "steps of a block; none: one per position", low=1)
    threshold: float | None = option(
        None, "confidence above which a token is committed in any case; none: a fixed schedule", low=0, high=1,
        above=True, reason="a probability",
    )  # fmt: skip
    sequential: bool = option(False, "commit from left to right, whatever the confidence")

    @property
    def ranking(self) -> Ranking:
        """By the token's probability in the distribution it is drawn from."""
        return Ranking(tempered=True)

    def for_model(self, config: ModelConfig) -> Self:
        """The policy with the model's block length; raises OptionError for a model with full attention."""
        super().for_model(config)
        return self if self.block_length else replace(self, block_length=config.block_length)

    def check(self, capacity: Capacity, gen_length: int) -> None:
        """Raise OptionError for an option out of range, or two that exclude each other."""
        check_options(self, {"block_length": (capacity.max_length, "the bundle's length")})
        assert self.block_length is not None
        if self.steps is not None:
            within("steps", self.steps, 1, self.block_length, "as many as a block has positions")
        if self.threshold is not None and self.sequential:
            raise OptionError("sequential goes by position and a threshold by confidence; leave one out")

    def answer_length(self, prompt_length: int, gen_length: int) -> int:
        """Masks up to the end of the answer's last block."""
        assert self.block_length is not None
        return -(-(prompt_length + gen_length) // self.block_length) * self.block_length - prompt_length

    def plan(self, sequence: Sequence, step: int, tracked: Positions) -> StepPlan:
        """The masks of the first block that has one."""
        block = self.block_length
        assert block is not None
        start = int(sequence.open[0]) // block * block
        candidates = sequence.open[sequence.open < start + block]
        in_block = sum(start <= int(positions[0]) for positions in sequence.history)
        first = 0 if step == 0 else start if in_block else max(0, start - block)
        base, more = divmod(block, self.steps or block)
        commits = min(base + (in_block < more), len(candidates))
        if self.sequential:
            candidates = candidates[:commits]
        above = None if self.threshold is None else float(np.nextafter(np.float32(self.threshold), np.float32(2)))
        return StepPlan(
            active=np.arange(first, start + block), candidates=candidates, commits=commits, threshold=above
        )  # fmt: skip
