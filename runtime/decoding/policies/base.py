"""What a policy decides about a step, and what all policies share."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol, Self

from engines.config import Capacity, ModelConfig
from engines.errors import OptionError
from runtime.decoding.sampler import Ranking
from runtime.decoding.sequence import Positions, Sequence


@dataclass(frozen=True)
class DriftTest:
    """The drift test of a reuse pass (arXiv 2510.14973): a sigma below `gamma` triggers a refresh.

    `kind` is one of `engines.signatures.gpu.DRIFTS`. `track_num` of the keys that
    the window attends to most are tracked in each layer. A refresh computes the
    positions `refresh` [n] (None: all), from the `next` layer after the trigger or
    from the `first` of the model.
    """

    kind: str
    gamma: float
    track_num: int
    refresh: Positions | None = None
    refresh_start: str = "next"


@dataclass(frozen=True)
class StepPlan:
    """One step of decoding: what is computed, which masks are predicted, how many are committed.

    `active` are the positions of the rows to run (None: the whole sequence),
    `candidates` the masks to predict. The step commits the `commits` most confident
    candidates; if that is None, those that reach `threshold`, at least one; if
    `chance` is not None, each with that probability instead. Without a `drift_test`
    nothing is tested, tracked or refreshed. With `guidance` s > 0 the logits move
    away from those of a forward pass without the prompt, by the factor s + 1
    (arXiv 2502.09992, Equation 16). `boost` (id, amount) is added to the logits of the
    first candidate. With both `commits` and a `threshold` the step commits all that
    reach the threshold if they are as many, else `commits`.
    """

    active: Positions | None
    candidates: Positions
    commits: int | None = None
    threshold: float | None = None
    chance: float | None = None
    drift_test: DriftTest | None = None
    guidance: float = 0.0
    boost: tuple[int, float] | None = None


class Policy(Protocol):
    """Plans each step from the sequence and the tracked tokens alone; its fields are the options it uses."""

    name: ClassVar[str]
    title: ClassVar[str]
    bundle_defaults: ClassVar[bool]
    given: frozenset[str]

    @property
    def ranking(self) -> Ranking:
        """What candidates are ranked by."""
        ...

    @property
    def whole_blocks(self) -> bool:
        """Whether a block that holds an EOS is filled as any other; see `Sequence.whole_blocks`."""
        ...

    def for_model(self, config: ModelConfig) -> "Policy":
        """The policy with what the model decides; raises OptionError where it does not fit the model's attention."""
        ...

    def check(self, capacity: Capacity, gen_length: int) -> None:
        """Raise OptionError for an option out of range, or one that the bundle's capacity does not allow."""
        ...

    def answer_length(self, prompt_length: int, gen_length: int) -> int:
        """The masks of an answer of `gen_length` tokens; where blocks are completed, those of the last one count."""
        ...

    def masks_to_append(self, sequence: Sequence) -> int:
        """How many masks of the answer to append to the sequence before the next step is planned."""
        ...

    def plan(self, sequence: Sequence, step: int, tracked: Positions) -> StepPlan:
        """The plan of the next step, the `step`-th from 0. `tracked` [n] are the tracked positions."""
        ...


class PolicyOptions:
    """Base of the policies: remembers which options were given, as opposed to left at their defaults.

    `title` says in a few words what a step computes. With `bundle_defaults` the
    options that are not given come from the bundle's decoding defaults.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    bundle_defaults: ClassVar[bool] = False
    block_causal: ClassVar[bool] = False  # the attention that the model must have
    whole_blocks: ClassVar[bool] = False  # see `Sequence.whole_blocks`
    given: frozenset[str]

    def __new__(cls, *args: Any, **options: Any) -> "PolicyOptions":
        self = super().__new__(cls)
        names = [item.name for item in fields(cls)]  # type: ignore[arg-type]
        object.__setattr__(self, "given", frozenset([*names[: len(args)], *options]))
        return self

    @property
    def ranking(self) -> Ranking:
        return Ranking()

    def masks_to_append(self, sequence: Sequence) -> int:
        return sequence.remaining

    def answer_length(self, prompt_length: int, gen_length: int) -> int:
        return gen_length

    def for_model(self, config: ModelConfig) -> Self:
        if (config.block_length is not None) != self.block_causal:
            kinds = ("full", "block-causal") if config.block_length else ("block-causal", "full")
            raise OptionError(
                f"policy {self.name} needs {kinds[0]} attention, and this model's is {kinds[1]}; "
                f"use --policy {'block' if config.block_length else 'elastic'}"
            )
        return self


def shifted_rows(sequence: Sequence, candidates: Positions) -> tuple[Positions, ...]:
    """The rows that predict `candidates`, where these are not the candidates' own."""
    return (sequence.logits_rows(candidates),) if sequence.shift else ()
