"""A request: what to decode and how, apart from the policy, and what is refused before the first step."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from engines.errors import OptionError, PromptError
from engines.model import Model, check_ids
from runtime.decoding.policies.base import Policy, within
from runtime.decoding.sampler import Sampler
from runtime.decoding.sequence import Positions


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
