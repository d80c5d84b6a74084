"""Policies: which rows a step computes, which masks it predicts, how many it commits.

Each is a small frozen dataclass whose fields are exactly the options it uses.
`elastic` is Elastic-Cache (arXiv 2510.14973); the others are baselines of the
same loop: `full` is block-wise decoding (arXiv 2502.09992), `timesteps` the
schedule of arXiv 2508.15487, `prefix` and `dual` Fast-dLLM's block caches (arXiv
2505.22618), `interval` the fixed periods of dLLM-Cache (arXiv 2506.06295). No
policy holds a tensor or a slot.
"""

from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, ClassVar, Protocol

import numpy as np

from engines.errors import OptionError
from engines.spec import DRIFTS, Capacity
from runtime.sampler import Ranking
from runtime.sequence import Positions, Sequence

SCOPES = ("all", "near")
REMASKING = ("low_confidence", "random")
ALGORITHMS = ("maskgit_plus", "topk_margin", "entropy", "origin")


@dataclass(frozen=True)
class Plan:
    """One step: rows to run (`active`, None for the whole sequence), masks to predict, commits.

    `commits` is the number of most confident candidates to commit; None commits
    by the threshold. With `chance` each candidate is committed with that
    probability instead.
    """

    active: Positions | None
    candidates: Positions
    commits: int | None
    chance: float | None = None


class Policy(Protocol):
    """Plans each step from the sequence alone (and the tracked tokens, if it watches drift)."""

    name: ClassVar[str]
    threshold: float | None

    @property
    def watches(self) -> bool: ...
    @property
    def ranking(self) -> Ranking: ...
    def check(self, capacity: Capacity, gen_length: int) -> None: ...
    def plan(self, sequence: Sequence, step: int, tracked: Positions) -> Plan: ...


@dataclass(frozen=True)
class Elastic:
    """A sliding window of masks; layers after the first that drifts are refreshed.

    With `horizon` the answer unrolls as it is filled: no more than that many of
    its masks are there at once, and when half of them are filled as many follow.
    With `reach` the window ends that many positions after its first mask, so that
    an uncertain token is settled before what depends on it.
    """

    name: ClassVar[str] = "elastic"
    watches: ClassVar[bool] = True
    ranking: ClassVar[Ranking] = Ranking()
    window: int = 16
    threshold: float | None = 0.9
    tokens_per_step: int | None = None
    gamma: float = 0.9
    drift: str = "row"
    track_num: int = 1
    block_caching: bool = True
    refresh_scope: str = "all"
    horizon: int | None = None
    reach: int | None = None

    def check(self, capacity: Capacity, gen_length: int) -> None:
        within("window", self.window, 1, capacity.window, "the bundle's capacity; build with a larger --window")
        within("track_num", self.track_num, 1, capacity.track_num, "the bundle's capacity; build with --track-num")
        within("gamma", self.gamma, 0.0, 1.0, "a cosine similarity")
        if self.horizon is not None:
            within("horizon", self.horizon, 2 * self.window, 10**9, "no less than two windows")
        if self.reach is not None:
            within("reach", self.reach, 1, 10**9, "positions")
        among("drift", self.drift, DRIFTS)
        among("refresh_scope", self.refresh_scope, SCOPES)
        check_threshold(self.threshold)
        if self.tokens_per_step is not None:
            within("tokens_per_step", self.tokens_per_step, 1, self.window, "the window")

    def plan(self, sequence: Sequence, step: int, tracked: Positions) -> Plan:
        window = sequence.open[: self.window]
        if self.reach is not None:
            window = window[window < window[0] + self.reach]
        if step == 0:
            return Plan(None, window, self.tokens_per_step)
        ahead = window if self.block_caching else sequence.open
        active = np.unique(np.concatenate([tracked, sequence.last, ahead, *readers(sequence, window)]))
        return Plan(active, window, self.tokens_per_step)


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
            raise OptionError("remasking random ranks nothing that a threshold could judge; give steps instead of it")
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

    def plan(self, sequence: Sequence, step: int, tracked: Positions) -> Plan:
        start, end = self.span(sequence)
        candidates = sequence.open[sequence.open < end]
        filled = int((sequence.ids[start:end] != sequence.mask_id).sum())
        active = self.rows(sequence, step, start, end, new=filled == 0)
        if active is not None:
            active = np.unique(np.concatenate([active, *readers(sequence, candidates)]))
        elif self.first_alone and sequence.shift and self.threshold is not None:
            candidates = candidates[:1]
        return Plan(active, candidates, None if self.threshold is not None else self.commits(sequence, filled))

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

    def plan(self, sequence: Sequence, step: int, tracked: Positions) -> Plan:
        candidates = sequence.open
        steps = self.steps or len(sequence) - sequence.prompt_length
        share = np.float32(1) if step >= steps - 1 else 1 - self.time(step + 1, steps) / self.time(step, steps)
        if self.alg == "origin":
            return Plan(None, candidates, None, chance=float(share))
        return Plan(None, candidates, int(np.float32(len(candidates)) * share))

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


POLICIES: dict[str, Any] = {p.name: p for p in (Elastic, Full, Timesteps, Prefix, Dual, Interval)}
CACHED_THRESHOLD = 0.9  # of the block caches, where neither threshold nor steps are given


def make_policy(name: str, options: dict[str, Any], defaults: dict[str, Any] | None = None) -> Policy:
    """The policy `name` with `options` (None: not given) over the bundle's `defaults`.

    Raises OptionError for an unknown policy, an option it does not use, or two
    that exclude each other.
    """
    if name not in POLICIES:
        raise OptionError(f"unknown policy {name!r}; choose from {', '.join(POLICIES)}")
    cls = POLICIES[name]
    known = {f.name for f in fields(cls)}
    given = {key: value for key, value in options.items() if value is not None}
    for key in given:
        if key not in known:
            raise OptionError(f"policy {name} does not use {key}; its options are {', '.join(sorted(known))}")
    for rival in ("tokens_per_step", "steps"):
        if "threshold" in given and rival in given:
            raise OptionError(f"threshold and {rival} exclude each other; give one of them")
    values = {k: v for k, v in (defaults or {}).items() if k in known and cls in (Elastic, Timesteps)} | given
    if "tokens_per_step" in given:
        values["threshold"] = None
    if issubclass(cls, Blocks) and cls is not Full and "steps" not in given:
        values.setdefault("threshold", CACHED_THRESHOLD)
    policy: Policy = cls(**values)
    return policy


def readers(sequence: Sequence, candidates: Positions) -> tuple[Positions, ...]:
    """The rows that predict `candidates`, where they are others than their own."""
    return (sequence.readers(candidates),) if sequence.shift else ()


def within(name: str, value: Any, low: float, high: float, why: str) -> None:
    number = isinstance(value, Integral if isinstance(low, int) else Real) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise OptionError(f"{name} must lie in {low} … {high} ({why}), got {value}")


def among(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_threshold(value: float | None) -> None:
    if value is not None and not (isinstance(value, Real) and 0 < float(value) <= 1):
        raise OptionError(f"threshold must lie in (0, 1] (a probability), got {value}")
