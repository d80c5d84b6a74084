"""One decoding step: bring the active set forward, walk the layers, predict, commit.

The controller joins a policy (what to compute), the slot map (where rows lie), a
back end's walk (how layers run) and the sequence (what is known). It holds no
tensors and reads from the device only drift numbers, tracked slots, tokens and
confidences.
"""

import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engines.errors import BackendError
from engines.runner import DriftInputs, Probes, ReusePass, ReuseResult, SequenceRunner, Slots
from runtime.decoding.policies import Elastic
from runtime.decoding.policies.base import Policy, StepPlan
from runtime.decoding.sampler import Sampler, choose, margin
from runtime.decoding.sequence import NO_POSITIONS, Positions, Sequence
from runtime.decoding.slots import SlotMap


@dataclass(frozen=True)
class StepEvent:
    """What a step did. Positions are absolute; `trigger` is the 0-based layer whose drift test fired.

    `rows` counts the rows run, summed over layers; `margin` is the smallest
    distance of a commit decision to flipping, to tell float noise from error.
    """

    step: int
    active: int
    sigma: list[float]
    trigger: int | None
    window: list[int]
    committed: list[int]
    tokens: list[int]
    confidences: list[float]
    tracked: list[int]
    rows: int
    margin: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Controller:
    """Decodes one sequence with one policy on one walk."""

    def __init__(self, runner: SequenceRunner, sequence: Sequence, policy: Policy, sampler: Sampler):
        self.runner, self.sequence, self.policy, self.sampler = runner, sequence, policy, sampler
        self.map = SlotMap(runner.slots if runner.padded_rows else len(sequence))
        self.tracked = NO_POSITIONS
        self.steps = 0

    def step(self) -> StepEvent:
        """Run one denoising step; the sequence must have a mask to fill."""
        stages = self.stages()
        try:
            due = next(stages)
            while True:
                due = stages.send(due.runner.reuse(due.rows, due.watch, due.gamma))
        except StopIteration as end:
            event: StepEvent = end.value
            return event

    def stages(self) -> Generator[ReusePass, ReuseResult, StepEvent]:
        """One step that stops where its reuse pass is due, so that those of several sequences can be run as one:
        yields the pass, is sent its outcome, and returns the event. A step without one does not yield."""
        began = time.perf_counter()
        unrolled = self._unroll()
        plan = self.policy.plan(self.sequence, self.steps, self.tracked)
        if plan.active is None:
            active, reuse, rows = len(self.sequence), ReuseResult([], None, []), self._whole(plan)
        else:
            active = len(plan.active)
            count = self._fill(plan.active)
            self._embed(count)
            watch = self._watch(plan)
            if watch is None:
                self.runner.run_layers(count, None, logits_rows=self._logits_rows(plan.candidates))
                reuse, rows = ReuseResult([], None, []), active * self.runner.config.layers
            else:
                assert isinstance(self.policy, Elastic)
                reuse = yield ReusePass(self.runner, count, watch, self.policy.gamma)
                rows = self._refresh(plan, reuse, active)
        tokens, confidence = self._predict(plan.candidates)
        if not np.isfinite(confidence).all():
            raise BackendError(
                f"the model's confidences at step {self.steps} are not numbers; check it with "
                "`python -m export verify`, or build with --bf16 or --fp32"
            )
        taken, close = self._choose(plan, tokens, confidence)
        positions, chosen = plan.candidates[taken], tokens[taken]
        self.sequence.commit(positions, chosen)
        self.steps += 1
        return StepEvent(
            self.steps - 1, active, reuse.sigma, reuse.trigger, plan.candidates.tolist(),
            positions.tolist(), chosen.tolist(), confidence[taken].tolist(),
            self.tracked.tolist(), unrolled + rows, close, time.perf_counter() - began,
        )  # fmt: skip

    def _unroll(self) -> int:
        """Let more masks follow when half of the horizon is filled, and cache them; returns the rows run."""
        max_masks = getattr(self.policy, "max_masks", None)
        if max_masks is None or self.sequence.end is not None or len(self.sequence.open) > max_masks // 2:
            return 0
        fresh = self.sequence.grow(max_masks - len(self.sequence.open))
        if len(fresh):
            self.map.grow(len(self.sequence))
            self.runner.grow(self.map.slot_of[fresh])
            count = self._fill(fresh)
            self._embed(count)
            self.runner.run_layers(count, None)
        return len(fresh) * self.runner.config.layers

    def _whole(self, plan: StepPlan) -> int:
        """Run every layer over the whole sequence; returns the rows run."""
        if self.runner.padded_rows and isinstance(self.policy, Elastic):
            self._bring_to_front(plan.candidates)  # the probe looks at the first rows
        count = len(self.map.slot_of)
        self._embed(count)
        probes = self.runner.run_layers(count, self._watch(plan), logits_rows=self._logits_rows(plan.candidates))
        self._track(self._positions(probes))
        return len(self.sequence) * self.runner.config.layers

    def _embed(self, count: int, hidden: int = 0) -> None:
        """Embed the ids of the first slots, the first `hidden` positions as [MASK]; any id does for a dummy."""
        positions = self.map.position_at[:count]
        ids = self.sequence.ids[np.where(positions < len(self.sequence), positions, 0)]
        self.runner.embed(np.where(positions < hidden, self.sequence.mask_id, ids) if hidden else ids)

    def _fill(self, active: Positions) -> int:
        """Bring the active positions to the first slots, and as many dummies as the walk wants; returns the rows."""
        missing = max(0, self.runner.padded_rows - len(active))
        if not missing:
            self._bring_to_front(active)
            return len(active)
        dummies = len(self.sequence) + np.argsort(self.map.slot_of[len(self.sequence) :])[:missing]
        self._bring_to_front(np.concatenate([active, dummies]))
        return len(active) + missing

    def _refresh(self, plan: StepPlan, reuse: ReuseResult, active: int) -> int:
        """Refresh the layers after one that drifted in a reuse pass of `active` rows; returns the rows run by both."""
        layers = self.runner.config.layers
        tracked = self._positions(reuse.probes)
        rows = active * len(reuse.probes)
        if reuse.trigger is not None and reuse.trigger + 1 < layers:
            count = self._widen(plan)
            logits_rows = self._logits_rows(plan.candidates)
            probes = self.runner.run_layers(count, self._watch(plan), first=reuse.trigger + 1, logits_rows=logits_rows)
            tracked = np.concatenate([tracked, self._positions(probes)])
            rows += min(count, len(self.sequence)) * (layers - reuse.trigger - 1)
        self._track(tracked)
        return rows

    def _widen(self, plan: StepPlan) -> int:
        """Bring what a refresh computes to the first slots: all, or all but the masks beyond the window."""
        assert isinstance(self.policy, Elastic) and plan.active is not None
        if self.policy.refresh_scope == "all":
            return len(self.map.slot_of)
        far = np.setdiff1d(self.sequence.masked, plan.active)
        near = np.setdiff1d(np.arange(len(self.sequence)), far)
        self._bring_to_front(near)
        return len(near)

    def _bring_to_front(self, positions: Positions) -> None:
        target, source = self.map.bring_to_front(positions)
        if len(target):
            self.runner.permute(target, source)

    def _watch(self, plan: StepPlan) -> DriftInputs | None:
        """What the drift test and the probe look at, in slots."""
        if not isinstance(self.policy, Elastic):
            return None
        slots = self.map.slot_of
        eligible = np.zeros(self.runner.slots, bool)
        eligible[slots[: len(self.sequence)]] = True
        eligible[slots[self.sequence.masked]] = False
        logits_rows = self._logits_rows(plan.candidates)
        return DriftInputs(self.policy.drift, slots[self.tracked], slots[plan.candidates], eligible, logits_rows)

    def _logits_rows(self, candidates: Positions) -> Slots:
        """The slots whose rows predict the candidates."""
        return self.map.slot_of[self.sequence.logits_rows(candidates)]

    def _positions(self, probes: Probes) -> Positions:
        """The positions of the tracked slots of some layers, at most `track_num` a layer."""
        if not len(probes):
            return NO_POSITIONS
        assert isinstance(self.policy, Elastic)
        known = len(self.sequence) - len(self.sequence.masked)
        best = np.asarray(probes)[:, : min(self.policy.track_num, known)]
        return self.map.position_at[best.ravel()]

    def _track(self, positions: Positions) -> None:
        self.tracked = np.array(sorted(set(positions.tolist())), np.int64)  # of a handful, quicker than `union`

    def _choose(self, plan: StepPlan, tokens: Positions, confidence: np.ndarray) -> tuple[np.ndarray, float]:
        """Which candidates the policy takes, and the decision's margin."""
        ranks = self.sampler.order(tokens, confidence)
        if plan.chance is not None:
            taken, close = np.flatnonzero(self.sampler.rng.random(len(tokens)) < plan.chance), 1.0
        else:
            taken = choose(ranks, self.policy.threshold, plan.commits)
            close = margin(ranks, self.policy.threshold, plan.commits)
        return taken, close

    def _predict(self, candidates: Positions) -> tuple[Positions, np.ndarray]:
        """A token for each candidate, and how sure it is."""
        rows = self._logits_rows(candidates)
        guidance = getattr(self.policy, "cfg_scale", 0.0)
        if self.sampler.greedy and not guidance:
            return self.runner.head(rows)
        logits = self.runner.logits(rows)
        if guidance:  # every row is computed at every step, so the forward without the prompt may overwrite the caches
            self._embed(len(self.map.slot_of), hidden=self.sequence.prompt_length)
            self.runner.run_layers(len(self.map.slot_of), None, logits_rows=rows)
            blind = self.runner.logits(rows)
            logits = blind + (guidance + 1) * (logits - blind)
        return self.sampler.draw(logits)
