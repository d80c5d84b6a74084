"""Elastic-Cache (arXiv 2510.14973): a sliding window of masks over an adaptive cache."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from engines.config import Capacity
from engines.errors import OptionError
from engines.options import check_options, option, within
from engines.signatures.gpu import DRIFTS
from runtime.decoding.policies.base import DriftTest, PolicyOptions, StepPlan, shifted_rows
from runtime.decoding.sequence import Positions, Sequence, union

SCOPES = ("all", "near")
STARTS = ("next", "first")


@dataclass(frozen=True)
class Elastic(PolicyOptions):
    """A window of masks is predicted per step; the layers after the first that drifted are refreshed.

    `max_masks` and `window_span` go beyond the paper. With `max_masks` the answer
    is appended as it is filled: no more than that many of its masks exist at once,
    and when half of them are filled as many are appended. With `window_span` the
    window ends that many positions after its first mask, so that an uncertain
    token is committed before the tokens that depend on it. With `refresh_start` first
    a refresh computes all layers: layers up to the one that drifted keep no rows of
    earlier steps, as they do otherwise.
    """

    name: ClassVar[str] = "elastic"
    title: ClassVar[str] = (
        "tracked tokens, last commits, a window of masks; everything in the layers after the first one that drifted"
    )
    bundle_defaults: ClassVar[bool] = True

    window: int = option(16, "masks predicted per step", low=1)
    threshold: float | None = option(
        0.9, "confidence from which a token is committed", low=0, high=1, above=True, reason="a probability",
        excludes=("tokens_per_step",),
    )  # fmt: skip
    tokens_per_step: int | None = option(None, "commit this many tokens per step, whatever their confidence", low=1)
    gamma: float = option(
        0.9,
        "sigma (similarity of the attention) below which a layer has drifted",
        low=0.0,
        high=1.0,
        reason="a cosine similarity",
    )
    drift: str = option("row", "the drift test of the paper (row) or of the published code (head)", choices=DRIFTS)
    track_num: int = option(1, "tracked tokens per layer", low=1)
    block_caching: bool = option(
        True, "masks beyond the window keep the K and V of their last refresh (no relation to block_length)"
    )
    refresh_scope: str = option(
        "all", "what a refresh computes: all, or not the masks beyond the window", choices=SCOPES
    )
    refresh_start: str = option(
        "next", "where a refresh begins: the next layer after the one that drifted, or the first layer", choices=STARTS
    )
    max_masks: int | None = option(None, "masks of the answer that exist at once", low=1)
    window_span: int | None = option(
        None, "positions from its first mask that the window spans", low=1, reason="positions"
    )

    def check(self, capacity: Capacity, gen_length: int) -> None:
        """Raise OptionError for an option out of range, or one that the bundle's capacity does not allow."""
        limits = {
            "window": (capacity.window, "the bundle's capacity"),
            "track_num": (capacity.track_num, "the bundle's capacity"),
            "tokens_per_step": (self.window, "the window"),
        }
        check_options(self, limits)
        if self.max_masks is not None:
            within("max_masks", self.max_masks, 2 * self.window, 10**9, "no less than two windows")
        if self.threshold is None and self.tokens_per_step is None:
            raise OptionError("threshold none needs a number of commits per step; give tokens_per_step")

    def masks_to_append(self, sequence: Sequence) -> int:
        """How many masks restore the number of open masks to `max_masks`; all that remain without this option.

        0 while more than half of `max_masks` are open, or after an EOS.
        """
        if self.max_masks is None:
            return sequence.remaining
        open_masks = int((sequence.open >= sequence.tail_start).sum())
        if sequence.end is not None or open_masks > self.max_masks // 2:
            return 0
        return min(self.max_masks - open_masks, sequence.remaining)

    def plan(self, sequence: Sequence, step: int, tracked: Positions) -> StepPlan:
        """The window of the first masks; active are the tracked tokens, the last commits and the window."""
        window = sequence.open[: self.window]
        if self.window_span is not None:
            window = window[window < window[0] + self.window_span]
        active = refresh = None
        if step > 0:
            masks = window if self.block_caching else sequence.open
            active = union(len(sequence), tracked, sequence.last, masks, *shifted_rows(sequence, window))
            if self.refresh_scope == "near":
                far = np.setdiff1d(sequence.masked, active)
                refresh = np.setdiff1d(np.arange(len(sequence)), far)
        return StepPlan(
            active=active, candidates=window, commits=self.tokens_per_step, threshold=self.threshold,
            drift_test=DriftTest(
                kind=self.drift, gamma=self.gamma, track_num=self.track_num, refresh=refresh,
                refresh_start=self.refresh_start,
            ),
        )  # fmt: skip
