"""One decoding step: bring the active set to the front, run the layers, predict, commit.

The controller joins a policy (what a step computes), the slot map (where rows
lie), a back end's runner (how layers run) and the sequence (ids and masks). It
holds no tensor of a device. It reads from the device only sigma, tracked slots,
and each candidate's token and confidence; the candidates' logits where these do
not suffice (sampling, guidance, forbidden ids, another ranking). What differs
between policies is in the step's plan.
"""

import time
from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray

from engines.errors import BackendError
from engines.runner import DriftInputs, PrefixState, Probes, ReusePass, ReuseResult, SequenceRunner, Slots
from runtime.decoding.events import StepEvent
from runtime.decoding.holes import Canvas
from runtime.decoding.policies.base import Policy, StepPlan
from runtime.decoding.sampler import Sampler, choose, margin
from runtime.decoding.sequence import NO_POSITIONS, Positions, Sequence
from runtime.decoding.slots import SlotMap

NOT_TESTED = ReuseResult([], None, [])


class Controller:
    """Decodes one sequence with one policy on one runner."""

    def __init__(self, runner: SequenceRunner, sequence: Sequence, policy: Policy, sampler: Sampler):
        self.runner, self.sequence, self.policy, self.sampler = runner, sequence, policy, sampler
        self.map = SlotMap(runner.slots if runner.padded_rows else len(sequence))
        self.tracked = NO_POSITIONS
        self.steps, self.remedy = 0, "python -m export verify"  # the command that checks the model
        self.canvas: Canvas | None = None  # of a sequence with holes
        self.prefix_rows = 0  # whose state was reused

    def use_prefix(self, state: PrefixState) -> None:
        """Begin with the rows of a prefix as they are in `state`; the first pass runs those behind them."""
        count, length = state.rows, len(self.sequence)
        order = np.concatenate([np.arange(count, length), np.arange(count), np.arange(length, self.runner.slots)])
        self.map.arrange(order[: len(self.map.slot_of)])
        self.runner.arrange(order)
        self.runner.set_prefix_state(state, length - count)
        self.prefix_rows = count

    def step(self) -> StepEvent:
        """Run one denoising step; the sequence must have a mask to fill."""
        stages = self.stages()
        try:
            due = next(stages)
            while True:
                due = stages.send(due.runner.reuse(due.rows, due.drift_inputs, due.gamma))
        except StopIteration as end:
            event: StepEvent = end.value
            return event

    def stages(self) -> Generator[ReusePass, ReuseResult, StepEvent]:
        """One step as a generator that pauses where its reuse pass is due, so that several sequences can run it as one.

        Yields the pass, is sent its result, and returns the event. A step without a
        reuse pass does not yield.
        """
        began = time.perf_counter()
        fresh = self._append_masks()
        plan = self.policy.plan(self.sequence, self.steps, self.tracked)
        appended, start = 0 if plan.active is None else self._run_fresh(fresh), None
        if plan.active is None:
            active, result, rows = len(self.sequence), NOT_TESTED, self._full_pass(plan)
        else:
            active = len(plan.active)
            if plan.drift_test is not None and 0 < self.runner.front_rows < active:
                self._bring_to_front(np.concatenate([self.tracked, plan.candidates]))  # and there they stay
            count = self._pad(plan.active)
            self._embed(count)
            drift_inputs = self._drift_inputs(plan)
            if drift_inputs is None or plan.drift_test is None:
                self.runner.run_layers(count, None, logits_rows=self._logits_rows(plan.candidates))
                result, rows = NOT_TESTED, active * self.runner.config.layers
            else:
                result = yield ReusePass(self.runner, count, drift_inputs, plan.drift_test.gamma)
                start = self._refresh_start(plan, result)
                rows = active * len(result.probes) + self._refresh(plan, result, start)
        tokens, confidence = self._predict(plan)
        if not np.isfinite(confidence).all():
            raise BackendError(
                f"the model's confidences at step {self.steps} are not finite numbers; check it with `{self.remedy}`"
            )
        taken, distance = self._choose(plan, tokens, confidence)
        if self.canvas is not None:
            taken = taken[self.canvas.agreeing(self.sequence, plan.candidates[taken], tokens[taken], confidence[taken])]
        positions, chosen = plan.candidates[taken], tokens[taken]
        self.sequence.commit(positions, chosen)
        self.steps += 1
        return StepEvent(
            step=self.steps - 1, active=active, sigma=result.sigma, trigger=result.trigger,
            refreshed_from=start, window=plan.candidates.tolist(), committed=positions.tolist(), tokens=chosen.tolist(),
            confidences=confidence[taken].tolist(), tracked=self.tracked.tolist(), rows=appended + rows,
            margin=distance, seconds=time.perf_counter() - began,
        )  # fmt: skip

    def _append_masks(self) -> Positions:
        """Append the masks that the policy asks for; returns their positions."""
        count = self.policy.masks_to_append(self.sequence)
        if not count:
            return NO_POSITIONS
        fresh = self.sequence.append_masks(count)
        self.map.grow(len(self.sequence))
        self.runner.grow(self.map.slot_of[fresh])
        return fresh

    def _run_fresh(self, fresh: Positions) -> int:
        """Run rows that were just appended through all layers; returns the layer-rows run."""
        if len(fresh):
            rows = self._pad(fresh)
            self._embed(rows)
            self.runner.run_layers(rows, None)
        return len(fresh) * self.runner.config.layers

    def _full_pass(self, plan: StepPlan) -> int:
        """Run every layer over the whole sequence, or what is behind a reused prefix; returns the layer-rows run."""
        if self.runner.front_rows and plan.drift_test is not None:
            self._bring_to_front(plan.candidates)
        rows = len(self.sequence) - self.prefix_rows
        count = rows if self.prefix_rows else len(self.map.slot_of)
        self._embed(count)
        probes = self.runner.run_layers(count, self._drift_inputs(plan), logits_rows=self._logits_rows(plan.candidates))
        self._track(self._tracked_positions(plan, probes))
        return rows * self.runner.config.layers

    def _embed(self, count: int, as_masks: int = 0) -> None:
        """Embed the ids of the first `count` slots, positions below `as_masks` as masks; a dummy takes any id."""
        positions = self.map.position_at[:count]
        ids = self.sequence.ids[np.where(positions < len(self.sequence), positions, 0)]
        self.runner.embed(np.where(positions < as_masks, self.sequence.mask_id, ids) if as_masks else ids)

    def _pad(self, active: Positions) -> int:
        """Bring the active positions to the first slots, padded with dummies to the runner's row count; returns it."""
        missing = max(0, self.runner.padded_rows - len(active))
        if not missing:
            self._bring_to_front(active)
            return len(active)
        dummies = len(self.sequence) + np.argsort(self.map.slot_of[len(self.sequence) :])[:missing]
        self._bring_to_front(np.concatenate([active, dummies]))
        return len(active) + missing

    def _refresh_start(self, plan: StepPlan, result: ReuseResult) -> int | None:
        """The first layer to refresh; None without a trigger, and where no layer follows it."""
        if result.trigger is None or plan.drift_test is None:
            return None
        start = 0 if plan.drift_test.refresh_start == "first" else result.trigger + 1
        return start if start < self.runner.config.layers else None

    def _refresh(self, plan: StepPlan, result: ReuseResult, start: int | None) -> int:
        """Refresh the layers from `start` on (None: no layer) and track what they and the layers before found.

        Returns the layer-rows run.
        """
        tracked = self._tracked_positions(plan, result.probes[:start])
        rows = 0
        if start is not None:
            count, layers = self._bring_refreshed(plan), self.runner.config.layers
            if start == 0:
                self._embed(count)
            probes = self.runner.run_layers(
                count, self._drift_inputs(plan), start, self._logits_rows(plan.candidates)
            )  # fmt: skip
            tracked = np.concatenate([tracked, self._tracked_positions(plan, probes)])
            rows = min(count, len(self.sequence)) * (layers - start)
        self._track(tracked)
        return rows

    def _bring_refreshed(self, plan: StepPlan) -> int:
        """Bring the rows that a refresh computes to the first slots; returns how many they are."""
        if plan.drift_test is None or plan.drift_test.refresh is None:
            return len(self.map.slot_of)
        self._bring_to_front(plan.drift_test.refresh)
        return len(plan.drift_test.refresh)

    def _bring_to_front(self, positions: Positions) -> None:
        target, source = self.map.bring_to_front(positions)
        if len(target):
            self.runner.permute(target, source)

    def _drift_inputs(self, plan: StepPlan) -> DriftInputs | None:
        """What the drift test and the probe read, in slots; None without a drift test."""
        if plan.drift_test is None:
            return None
        slots = self.map.slot_of
        eligible = np.zeros(self.runner.slots, bool)
        eligible[slots[: len(self.sequence)]] = True
        eligible[slots[self.sequence.masked]] = False
        return DriftInputs(
            kind=plan.drift_test.kind, tracked=slots[self.tracked], window=slots[plan.candidates],
            probe_keys=eligible, logits_rows=self._logits_rows(plan.candidates),
        )  # fmt: skip

    def _logits_rows(self, candidates: Positions) -> Slots:
        """The slots whose rows predict the candidates."""
        return self.map.slot_of[self.sequence.logits_rows(candidates)]

    def _tracked_positions(self, plan: StepPlan, probes: Probes) -> Positions:
        """The positions of the tracked slots of some layers, at most `track_num` a layer."""
        if plan.drift_test is None or not len(probes):
            return NO_POSITIONS
        known = len(self.sequence) - len(self.sequence.masked)
        best = np.asarray(probes)[:, : min(plan.drift_test.track_num, known)]
        return self.map.position_at[best.ravel()]

    def _track(self, positions: Positions) -> None:
        self.tracked = np.array(sorted(set(positions.tolist())), np.int64)  # for few positions faster than `union`

    def _choose(
        self, plan: StepPlan, tokens: Positions, confidence: NDArray[np.floating]
    ) -> tuple[NDArray[np.int64], float]:
        """Indices of the candidates to commit, and the margin of the decision (1.0 where it is drawn at random)."""
        ranks = self.sampler.order(tokens, confidence)
        if plan.chance is not None:
            return np.flatnonzero(self.sampler.rng.random(len(tokens)) < plan.chance), 1.0
        return choose(ranks, plan.threshold, plan.commits), margin(ranks, plan.threshold, plan.commits)

    def _predict(self, plan: StepPlan) -> tuple[Positions, NDArray[np.floating]]:
        """A token [W] for each candidate, and its confidence [W]."""
        rows = self._logits_rows(plan.candidates)
        barred = self.canvas is not None and self.canvas.restricts(plan.candidates)
        if self.sampler.greedy and not plan.guidance and plan.boost is None and not barred:
            tokens, confidence = self.runner.head(rows)
            if self.sampler.allows(tokens):  # the head itself excludes the mask only
                return tokens, confidence
        logits = self.runner.logits(rows)
        if plan.guidance:  # every step computes all rows, so the pass without the prompt may overwrite the caches
            self._embed(len(self.map.slot_of), as_masks=self.sequence.prompt_length)
            self.runner.run_layers(len(self.map.slot_of), None, logits_rows=rows)
            blind = self.runner.logits(rows)
            logits = blind + (plan.guidance + 1) * (logits - blind)
        if plan.boost is not None:
            token, amount = plan.boost
            logits[0, token] += amount
        if self.canvas is not None:
            self.canvas.bar(self.sequence, plan.candidates, logits)
        return self.sampler.draw(logits)
