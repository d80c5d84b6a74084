"""The one decoding loop: a generator of step events that ends with the output.

CLI, evaluation and verification consume it; variants are policies.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from engines.errors import OptionError, PromptError
from engines.session import Model, Pass, Walk, check_ids
from runtime.controller import Controller, StepEvent
from runtime.policies import Policy, within
from runtime.sampler import Sampler
from runtime.sequence import Positions, Sequence


@dataclass(frozen=True)
class Request:
    """What to decode and how, apart from the policy."""

    prompt_ids: Any  # int array [P]
    gen_length: int = 256
    temperature: float = 0.0
    seed: int | None = None
    stop_at_eos: bool = True
    stop: str | None = None
    eos_id: int | None = None  # another end token than the model's
    top_p: float = 1.0
    top_k: int | None = None
    logits_eos_inf: bool = False  # EOS is never said
    confidence_eos_eot_inf: bool = False  # EOS and the end of a turn are said last
    embeddings: Any = None  # float32 [n, d], for which the prompt has the ids V … V + n - 1 (V: vocabulary)
    image_seconds: float = 0.0  # that these took


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
    share: float
    sequence: list[int]
    eos_at: int | None
    trace: list[StepEvent] = field(repr=False)
    image_seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("trace", "sequence")} | {
            "tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0
        }


def prompt_array(prompt: Any, model: Model, gen_length: int, given: int = 0) -> Positions:
    """Check a prompt's ids, `given` of which lie beyond the vocabulary, against the model; raises PromptError or
    OptionError."""
    try:
        ids = np.asarray(prompt)
    except ValueError as error:
        raise PromptError("prompt ids are not one flat list; write them as [1, 2, 3]") from error
    if ids.ndim != 1 or ids.size == 0:
        what = "empty" if ids.size == 0 else f"not one flat list but of shape {list(ids.shape)}"
        raise PromptError(f"the prompt is {what}; it needs at least one id, as in [1, 2, 3]")
    if not np.issubdtype(ids.dtype, np.integer):
        raise PromptError(f"prompt ids must be integers, got {ids.dtype}; write them as [1, 2, 3]")
    check_ids(ids, model.config.vocab + given)
    if (ids == model.config.mask_id).any():
        raise PromptError(
            f"the prompt contains the mask id {model.config.mask_id}, which only decoding may place; leave it out"
        )
    limit = model.capacity.max_length
    within("gen_length", gen_length, 1, limit, "the bundle's length")
    if len(ids) + gen_length > limit:
        raise PromptError(
            f"{len(ids)} prompt ids and gen_length {gen_length} exceed the bundle's length {limit}; "
            "shorten one of them or build with a larger --max-length"
        )
    return ids.astype(np.int64)


class Decoding:
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
        ends, horizon = self.eos if request.stop_at_eos else None, getattr(policy, "horizon", None)
        self.sequence = Sequence.start(prompt, request.gen_length, config.mask_id, ends, horizon, config.shift)
        self.trace: list[StepEvent] = []
        self.stopped = False

    @property
    def span(self) -> tuple[int, int]:
        """Positions at first, and at most."""
        return len(self.sequence), len(self.sequence) + self.sequence.room

    def begin(self, walk: Walk) -> None:
        """Start decoding on the memory for `span`."""
        if self.request.embeddings is not None:
            walk.give(np.ascontiguousarray(self.request.embeddings, np.float32))
        sampler = sampler_of(self.request, self.policy, self.model)
        self.controller = self.make(walk, self.sequence, self.policy, sampler)
        self.began = self.ended = time.perf_counter()

    @property
    def done(self) -> bool:
        return self.sequence.done or self.stopped

    def note(self, event: StepEvent) -> StepEvent:
        """Take a step's event into account."""
        self.trace.append(event)
        stop = self.request.stop
        self.stopped = stop is not None and stop in self.decode(settled(self.sequence, self.eos))
        self.ended = time.perf_counter()
        return event

    def output(self) -> Output:
        """The answer, when decoding is done."""
        sequence, steps = self.sequence, len(self.trace)
        answer = settled(sequence, self.eos) if self.stopped else sequence.answer(self.eos)
        text = self.decode(answer)
        if self.request.stop is not None:
            text = text.split(self.request.stop)[0]
        sequence.grow(sequence.room)  # what was never unrolled is [MASK]
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
    decoding = Decoding(model, request, policy, decode, make)
    with model.exclusive():
        decoding.begin(model.walk(*decoding.span))
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
    decodings = [Decoding(model, request, policy, decode) for request in requests]
    with model.exclusive():
        walks = model.walks([decoding.span for decoding in decodings])
        for decoding, walk in zip(decodings, walks, strict=True):
            decoding.begin(walk)
        running = dict(enumerate(decodings))
        while running:
            for number, event in step_all(model, {n: decoding.controller for n, decoding in running.items()}):
                yield number, running[number].note(event)
            for number in [n for n, decoding in running.items() if decoding.done]:
                walks[number].end()
                yield number, running.pop(number).output()


def step_all(model: Model, controllers: dict[int, Controller]) -> Iterator[tuple[int, StepEvent]]:
    """One step of each controller."""
    stages = {number: controller.stages() for number, controller in controllers.items()}
    due: dict[int, Pass] = {}
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


def checked(embeddings: Any, model: Model) -> Any:
    """`embeddings`, if they are float rows of the model's width; raises PromptError if not."""
    shape, kind = np.shape(embeddings), np.asarray(embeddings).dtype
    if len(shape) != 2 or shape[1] != model.config.d_model or not np.issubdtype(kind, np.floating):
        raise PromptError(
            f"embeddings must be floats of shape [n, {model.config.d_model}], got {kind} {list(shape)}; "
            "give one row for each id beyond the vocabulary"
        )
    if not np.isfinite(embeddings).all():
        raise PromptError("embeddings hold NaN or Inf, expected finite numbers; check what they come from")
    return embeddings


def sampler_of(request: Request, policy: Policy, model: Model) -> Sampler:
    config = model.config
    eos = config.end_id if request.eos_id is None else request.eos_id
    late = (eos,) if config.eot_id is None else (eos, config.eot_id)
    return Sampler(
        (config.mask_id,), policy.ranking, float(request.temperature), float(request.top_p), request.top_k,
        (eos,) if request.logits_eos_inf else (), config.suppressed, late if request.confidence_eos_eot_inf else (),
        request.seed,
    )  # fmt: skip


def check_request(request: Request, policy: Policy, model: Model, has_text: bool) -> None:
    """Check what lies outside of the prompt; raises OptionError."""
    if not (isinstance(request.top_p, Real) and 0 < float(request.top_p) <= 1):
        raise OptionError(f"top_p must lie in (0, 1] (a probability), got {request.top_p}")
    if request.top_k is not None:
        within("top_k", request.top_k, 1, model.config.vocab, "the vocabulary")
    if not (isinstance(request.temperature, Real) and 0 <= float(request.temperature) < math.inf):
        raise OptionError(f"temperature must be a number from 0 up, got {request.temperature}")
    if request.seed is not None:
        within("seed", request.seed, 0, 2**64 - 1, "64 bits")
    drawn = request.temperature > 0
    if request.seed is not None and not (drawn or policy.ranking.by_chance):
        raise OptionError("a seed has no effect without temperature; give --temperature, or leave the seed out")
    if (request.top_p < 1 or request.top_k is not None) and not (drawn or policy.ranking.tempered):
        raise OptionError("top_p and top_k have no effect without temperature; give --temperature, or leave them out")
    if request.eos_id is not None:
        within("eos_id", request.eos_id, 0, model.config.vocab - 1, "the vocabulary")
    if request.stop is not None and not (request.stop and has_text):
        why = "the bundle has no tokenizer to compare text" if request.stop else "it is empty"
        raise OptionError(f"stop cannot be used: {why}; give a text to stop at, or leave it out")


def settled(sequence: Sequence, eos_id: int) -> Positions:
    """The answer's ids before its first mask or EOS."""
    ids = sequence.ids[sequence.prompt_length :]
    ends = np.flatnonzero((ids == sequence.mask_id) | (ids == eos_id))
    return ids[: ends[0]] if len(ends) else ids


def spelled(ids: Positions) -> str:
    return " ".join(map(str, ids.tolist()))
