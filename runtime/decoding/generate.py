"""The one decoding loop: a generator of step events that ends with the output.

Command line, evaluation and verification consume it; variants of decoding are policies.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engines.model import Model
from engines.options import listed
from engines.runner import PrefixState, ReusePass, SequenceRunner
from runtime.decoding.controller import Controller
from runtime.decoding.events import StepEvent
from runtime.decoding.policies.base import Policy
from runtime.decoding.prefix import MASKS, PrefixCache, check_prefix, settled
from runtime.decoding.request import (
    Request,
    canvas_array,
    check_batch,
    check_canvas,
    check_capacity,
    check_embeddings,
    check_length,
    check_request,
    make_sampler,
    prompt_array,
)
from runtime.decoding.sequence import Positions, Sequence
from runtime.decoding.stops import Decode, complete, cut


@dataclass(frozen=True)
class Output:
    """The answer to a request.

    `text`, `ids` and `tokens` (their number) end alike: before the first EOS or stop
    string. `ended` says what ended them: `eos`, `stop`, or `length` where all masks
    were filled. `sequence` has the prompt and the whole answer. `computed_fraction` is the fraction of
    layer-rows computed: rows run over steps × layers × all positions, the first
    step included. `seconds` is the wall-clock time of the steps, `image_seconds`
    that of the images before them. `eos_at` is the position of the first EOS that
    ended decoding, `trace` has the event of each step. `prefix_rows` counts the
    prompt's ids whose state was reused.
    """

    ids: list[int]
    text: str
    steps: int
    tokens: int
    seconds: float
    computed_fraction: float
    sequence: list[int]
    eos_at: int | None
    trace: list[StepEvent] = field(repr=False)
    image_seconds: float = 0.0
    ended: str = "length"
    prefix_rows: int = 0

    def to_json(self) -> dict[str, Any]:
        """The output as JSON values, without `trace` and `sequence`, with the tokens per second."""
        return {name: value for name, value in vars(self).items() if name not in ("trace", "sequence")} | {
            "tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0
        }


class RequestState:
    """One request being decoded: its sequence, its controller, and the events so far."""

    def __init__(
        self, model: Model, request: Request, policy: Policy, decode: Decode | None,
        make_controller: Callable[..., Controller] = Controller,
    ):  # fmt: skip
        embedded = 0 if request.embeddings is None else check_embeddings(request.embeddings, model)
        if request.canvas is not None:
            check_canvas(request, policy, model)
        policy = policy.for_model(model.config)
        self.sequence = new_sequence(request, policy, model, embedded)
        check_request(request, policy, model, decode is not None)
        self.model, self.request, self.policy, self.decode = model, request, policy, decode or spell_ids
        self.make_controller = make_controller
        self.stops = listed(request.stop)
        self.sequence.append_masks(policy.masks_to_append(self.sequence))
        self.trace: list[StepEvent] = []
        self.stopped = False

    @property
    def span(self) -> tuple[int, int]:
        """(length now, largest length), in positions."""
        return len(self.sequence), len(self.sequence) + self.sequence.remaining

    def prefix_state(self, prefixes: PrefixCache | None) -> PrefixState | None:
        """The state of the request's prefix, if it has one and there is a cache; ask before there is a runner."""
        count, model = self.request.prefix, self.model
        if not count:
            return None
        check_prefix(self.request, self.policy, prefixes is not None)
        assert prefixes is not None
        masks = min(getattr(self.policy, "max_masks", None) or MASKS, model.capacity.max_length - count)
        ids = self.sequence.ids[:count]
        return prefixes.state(model, ids, self.request.embeddings, masks)

    def begin(self, runner: SequenceRunner, prefix: PrefixState | None = None) -> None:
        """Start decoding on a runner for `span`, with the rows of a prefix where there is one."""
        if self.request.embeddings is not None:
            runner.set_input_embeddings(np.ascontiguousarray(self.request.embeddings, np.float32))
        if self.model.config.block_length is not None:
            runner.block_length = getattr(self.policy, "block_length", None)
        sampler = make_sampler(self.request, self.policy, self.model)
        self.controller = self.make_controller(runner, self.sequence, self.policy, sampler)
        self.controller.remedy = self.model.bundle.verify
        self.controller.canvas = self.request.canvas
        if prefix is not None:
            self.controller.use_prefix(prefix)
        self.began = self.clock = time.perf_counter()

    @property
    def done(self) -> bool:
        """Whether no mask is left to fill, or a stop string is complete."""
        return self.sequence.done or self.stopped

    def record(self, event: StepEvent) -> StepEvent:
        """Add a step's event to the trace, and look for stop strings; returns the event."""
        self.trace.append(event)
        self.stopped = bool(self.stops) and complete(self.sequence.answer, self.decode, self.stops)
        self.clock = time.perf_counter()
        return event

    def output(self) -> Output:
        """The answer, when decoding is done."""
        sequence, steps = self.sequence, len(self.trace)
        ended = "stop" if self.stopped else "eos" if sequence.said_eos else "length"
        answer = sequence.answer
        answer, text = cut(answer, self.decode, self.stops) if self.stopped else (answer, self.decode(answer))
        sequence.append_masks(sequence.remaining)  # masks that were never needed stay masks
        possible = steps * self.model.config.layers * len(sequence)
        return Output(
            ids=answer.tolist(), text=text, steps=steps, tokens=len(answer), ended=ended,
            seconds=self.clock - self.began,
            computed_fraction=sum(event.rows for event in self.trace) / possible, sequence=sequence.ids.tolist(),
            eos_at=sequence.end, trace=self.trace, image_seconds=self.request.image_seconds,
            prefix_rows=self.controller.prefix_rows,
        )  # fmt: skip


def new_sequence(request: Request, policy: Policy, model: Model, embedded: int) -> Sequence:
    """The sequence of a request, no mask appended yet; raises PromptError or OptionError for what does not fit."""
    config, ends = model.config, request.end_ids(model.config)
    check_capacity(policy, model)
    if request.canvas is not None:
        ids = canvas_array(request.prompt_ids, request.canvas, model, embedded)
        sequence = Sequence.over(
            ids, request.canvas.spans, config.mask_id, ends, request.stop_at_eos, config.shift
        )  # fmt: skip
        policy.check(model.capacity, model.capacity.max_length)  # a block may be longer than all holes together
        return sequence
    prompt = prompt_array(request.prompt_ids, model, request.gen_length, embedded)
    policy.check(model.capacity, request.gen_length)
    masks = policy.answer_length(len(prompt), request.gen_length)
    check_length(len(prompt), masks, model)
    return Sequence.start(
        prompt, masks, config.mask_id, ends, request.stop_at_eos, masks=0, shift=config.shift,
        whole_blocks=policy.whole_blocks, answer_length=request.gen_length,
    )  # fmt: skip


def stream(
    model: Model, request: Request, policy: Policy, decode: Decode | None,
    make_controller: Callable[..., Controller] = Controller, prefixes: PrefixCache | None = None,
) -> Iterator[StepEvent | Output]:  # fmt: skip
    """Decode step by step: yields a StepEvent for each step, then the Output.

    `decode` turns ids [n] into text; None writes them as numbers. `make_controller`
    builds the controller, for one that also measures. Raises PromptError and
    OptionError before the first step; BackendError if another thread uses the
    model, or if its confidences are not finite.
    """
    state = RequestState(model, request, policy, decode, make_controller)
    with model.exclusive():
        with settled(prefixes):
            prefix = state.prefix_state(prefixes)
            state.begin(model.new_runner(*state.span), prefix)
        while not state.done:
            yield state.record(state.controller.step())
    yield state.output()


def stream_batch(
    model: Model, requests: list[Request], policy: Policy, decode: Decode | None, prefixes: PrefixCache | None = None
) -> Iterator[tuple[int, StepEvent | Output]]:
    """Decode several requests side by side: yields (number, event) for each step of each, and (number, Output).

    Each has its own window, drift decisions and end; its tokens are those that it
    has alone. Reuse passes of all run as one, full passes and refreshes one after
    the other. Raises what `stream` does, and OptionError for more requests than
    the bundle was built for, or none.
    """
    check_batch(len(requests), model)
    states = [RequestState(model, request, policy, decode) for request in requests]
    with model.exclusive():
        with settled(prefixes):
            reused = [state.prefix_state(prefixes) for state in states]
            runners = model.new_runners([state.span for state in states])
            for state, runner, prefix in zip(states, runners, reused, strict=True):
                state.begin(runner, prefix)
        running = dict(enumerate(states))
        while running:
            for number, event in step_all(model, {n: state.controller for n, state in running.items()}):
                yield number, running[number].record(event)
            for number in [n for n, state in running.items() if state.done]:
                runners[number].end()
                yield number, running.pop(number).output()


def step_all(model: Model, controllers: dict[int, Controller]) -> Iterator[tuple[int, StepEvent]]:
    """One step of each controller."""
    stages = {number: controller.stages() for number, controller in controllers.items()}
    due: dict[int, ReusePass] = {}
    for number, stage in stages.items():
        try:
            due[number] = next(stage)
        except StopIteration as end:
            yield number, end.value
    outcomes = model.reuse(list(due.values())) if due else []
    for number, outcome in zip(due, outcomes, strict=True):
        try:
            stages[number].send(outcome)
        except StopIteration as end:
            yield number, end.value


def spell_ids(ids: Positions, special: bool = False) -> str:
    """Ids [n] as numbers, for a bundle without a tokenizer."""
    return " ".join(map(str, ids.tolist()))
