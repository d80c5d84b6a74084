"""Policies: which rows a step computes, which masks it predicts, how many it commits.

Each is a small frozen dataclass whose fields are exactly the options it uses.
`elastic` is Elastic-Cache (arXiv 2510.14973); the others, in `runtime.decoding.policies.blocks`,
are policies of the same loop. No policy holds a tensor or a slot.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from engines.config import Capacity
from engines.errors import OptionError
from engines.signatures.gpu import DRIFTS
from runtime.decoding.policies.base import Policy, StepPlan, among, check_threshold, logits_rows, within
from runtime.decoding.policies.blocks import Blocks, Dual, Full, Interval, Prefix, Timesteps
from runtime.decoding.sampler import Ranking
from runtime.decoding.sequence import Positions, Sequence, union

SCOPES = ("all", "near")


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
    max_masks: int | None = None
    window_span: int | None = None

    def check(self, capacity: Capacity, gen_length: int) -> None:
        within("window", self.window, 1, capacity.window, "the bundle's capacity; build with a larger --window")
        within("track_num", self.track_num, 1, capacity.track_num, "the bundle's capacity; build with --track-num")
        within("gamma", self.gamma, 0.0, 1.0, "a cosine similarity")
        if self.max_masks is not None:
            within("max_masks", self.max_masks, 2 * self.window, 10**9, "no less than two windows")
        if self.window_span is not None:
            within("window_span", self.window_span, 1, 10**9, "positions")
        among("drift", self.drift, DRIFTS)
        among("refresh_scope", self.refresh_scope, SCOPES)
        check_threshold(self.threshold)
        if self.tokens_per_step is not None:
            within("tokens_per_step", self.tokens_per_step, 1, self.window, "the window")

    def plan(self, sequence: Sequence, step: int, tracked: Positions) -> StepPlan:
        window = sequence.open[: self.window]
        if self.window_span is not None:
            window = window[window < window[0] + self.window_span]
        if step == 0:
            return StepPlan(None, window, self.tokens_per_step)
        ahead = window if self.block_caching else sequence.open
        active = union(len(sequence), tracked, sequence.last, ahead, *logits_rows(sequence, window))
        return StepPlan(active, window, self.tokens_per_step)


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
