"""The one decoding loop: a generator of step events that ends with the output.

CLI, evaluation and verification consume it; variants are policies.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engines.model import Model
from engines.runner import ReusePass, SequenceRunner
from runtime.decoding.controller import Controller, StepEvent
from runtime.decoding.policies.base import Policy, within
from runtime.decoding.request import Request, check_request, checked, prompt_array, sampler_of
from runtime.decoding.sequence import Positions, Sequence


@dataclass(frozen=True)
class Output:
    """The answer. `ids` and `tokens` leave out EOS and what follows; `sequence` is all of it.

    `share` is the share of layer-rows computed: rows run over steps × layers ×
    all positions, the first step included. `seconds` are those of the steps;
    those that images took before them are beside.
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

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("trace", "sequence")} | {
            "tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0
        }


class RequestState:
    """One request under way: its controller, and what its answer will be."""

    def __init__(
        self, model: Model, request: Request, policy: Policy, decode: Callable[[Positions], str] | None,
        make: Callable[..., Controller] = Controller,
    ):  # fmt: skip
        given = 0 if request.embeddings is None else len(checked(request.embeddings, model))
        prompt = prompt_array(request.prompt_ids, model, request.gen_length, given)
        policy.check(model.capacity, request.gen_length)
        check_request(request, policy, model, decode is not None)
        self.model, self.request, self.policy, self.decode = model, request, policy, decode or spelled
        self.make = make
        config = model.config
        self.eos = config.end_id if request.eos_id is None else request.eos_id
        ends, max_masks = self.eos if request.stop_at_eos else None, getattr(policy, "max_masks", None)
        self.sequence = Sequence.start(prompt, request.gen_length, config.mask_id, ends, max_masks, config.shift)
        self.trace: list[StepEvent] = []
        self.stopped = False

    @property
    def span(self) -> tuple[int, int]:
        """Positions at first, and at most."""
        return len(self.sequence), len(self.sequence) + self.sequence.remaining

    def begin(self, runner: SequenceRunner) -> None:
        """Start decoding on the memory for `span`."""
        if self.request.embeddings is not None:
            runner.set_input_embeddings(np.ascontiguousarray(self.request.embeddings, np.float32))
        sampler = sampler_of(self.request, self.policy, self.model)
        self.controller = self.make(runner, self.sequence, self.policy, sampler)
        self.began = self.ended = time.perf_counter()

    @property
    def done(self) -> bool:
        return self.sequence.done or self.stopped

    def note(self, event: StepEvent) -> StepEvent:
        """Take a step's event into account."""
        self.trace.append(event)
        stop = self.request.stop
        self.stopped = stop is not None and stop in self.decode(finished_prefix(self.sequence, self.eos))
        self.ended = time.perf_counter()
        return event

    def output(self) -> Output:
        """The answer, when decoding is done."""
        sequence, steps = self.sequence, len(self.trace)
        answer = finished_prefix(sequence, self.eos) if self.stopped else sequence.answer(self.eos)
        text = self.decode(answer)
        if self.request.stop is not None:
            text = text.split(self.request.stop)[0]
        sequence.grow(sequence.remaining)  # what was never unrolled is [MASK]
        possible = steps * self.model.config.layers * len(sequence)
        return Output(
            answer.tolist(), text, steps, len(answer), self.ended - self.began,
            sum(event.rows for event in self.trace) / possible, sequence.ids.tolist(), sequence.end, self.trace,
            self.request.image_seconds,
        )  # fmt: skip


def stream(
    model: Model, request: Request, policy: Policy, decode: Callable[[Positions], str] | None,
    make: Callable[..., Controller] = Controller,
) -> Iterator[StepEvent | Output]:  # fmt: skip
    """Decode step by step: yields a StepEvent for each step, then the Output.

    `decode` turns ids to text; None spells them as numbers. `make` builds the
    controller, for one that also measures. Raises PromptError
    and OptionError before the first step; BackendError if another thread uses
    the model, or its numbers are not numbers.
    """
    decoding = RequestState(model, request, policy, decode, make)
    with model.exclusive():
        decoding.begin(model.new_runner(*decoding.span))
        while not decoding.done:
            yield decoding.note(decoding.controller.step())
    yield decoding.output()


def stream_batch(
    model: Model, requests: list[Request], policy: Policy, decode: Callable[[Positions], str] | None
) -> Iterator[tuple[int, StepEvent | Output]]:
    """Decode several requests side by side: yields (number, event) for each step of each, and (number, Output).

    Each has its own window, drift decisions and end; its tokens are those that it
    has alone. Reuse passes of all run as one, whole passes and refreshes one after
    the other. Raises what `stream` does, and OptionError for more requests than
    the bundle was built for, or none.
    """
    within("the number of prompts", len(requests), 1, model.capacity.max_batch, "build with a larger --max-batch")
    decodings = [RequestState(model, request, policy, decode) for request in requests]
    with model.exclusive():
        runners = model.new_runners([decoding.span for decoding in decodings])
        for decoding, runner in zip(decodings, runners, strict=True):
            decoding.begin(runner)
        running = dict(enumerate(decodings))
        while running:
            for number, event in step_all(model, {n: decoding.controller for n, decoding in running.items()}):
                yield number, running[number].note(event)
            for number in [n for n, decoding in running.items() if decoding.done]:
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


def finished_prefix(sequence: Sequence, eos_id: int) -> Positions:
    """The answer's ids before its first mask or EOS."""
    ids = sequence.ids[sequence.prompt_length :]
    ends = np.flatnonzero((ids == sequence.mask_id) | (ids == eos_id))
    return ids[: ends[0]] if len(ends) else ids


def spelled(ids: Positions) -> str:
    return " ".join(map(str, ids.tolist()))
