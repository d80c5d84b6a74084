"""A request: the prompt and the options that do not depend on the policy, and their checks."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.config import ModelConfig
from engines.errors import OptionError, PromptError
from engines.model import Model, check_ids
from engines.options import check_options, listed, option, options_of
from runtime.decoding.holes import Canvas
from runtime.decoding.policies.base import Policy
from runtime.decoding.sampler import Sampler
from runtime.decoding.sequence import Positions

SEEDS = 2**64 - 1
LAYOUTS = ("auto", "tile", "pad")  # of images


@dataclass(frozen=True)
class Request:
    """What to decode and how, apart from the policy.

    `prompt_ids` [P] may hold the ids V … V + n - 1 (V: vocabulary) where
    `embeddings` [n, d], float32, has the rows for them; `image_seconds` is the
    time it took to compute these. `unused` are ids of the vocabulary that no token
    has; they are never drawn. With a `canvas` the ids hold masks in its holes, which
    are all that is filled: `gen_length` is not used. The state of the first `prefix`
    ids may come from a `PrefixCache`.
    """

    prompt_ids: Any
    gen_length: int = option(256, "masks to fill", low=1, group="answer")
    stop_at_eos: bool = option(True, "end decoding when EOS is committed and all before it is filled", group="answer")
    stop: tuple[str, ...] | None = option(
        None, "end the answer before this string; a special token counts as its text", group="answer"
    )  # fmt: skip
    eos_id: tuple[int, ...] | None = option(
        None, "id of a token that ends the answer; none: all that the model declares", low=0, group="answer"
    )  # fmt: skip
    temperature: float = option(0.0, "temperature of sampling; 0: arg-max", low=0.0, group="sampling")
    top_p: float = option(
        1.0, "sample from the most probable tokens of this total probability", low=0, high=1, above=True,
        reason="a probability", group="sampling",
    )  # fmt: skip
    top_k: int | None = option(None, "sample from this many most probable tokens", low=1, group="sampling")
    seed: int | None = option(
        None, "seed of everything random", low=0, high=SEEDS, reason="64 bits", group="sampling"
    )  # fmt: skip
    logits_eos_inf: bool = option(False, "never commit EOS", group="sampling")
    confidence_eos_eot_inf: bool = option(
        False, "commit EOS and the end-of-turn token after all other candidates", group="sampling"
    )  # fmt: skip
    image_layout: str = option(
        "auto", "an image in tiles, or padded to one; auto: several are padded", choices=LAYOUTS, group="answer"
    )  # fmt: skip
    embeddings: Any = None
    canvas: Canvas | None = None
    prefix: int = 0
    image_seconds: float = 0.0
    unused: tuple[int, ...] = ()

    def eos_ids(self, config: ModelConfig) -> tuple[int, ...]:
        """The ids of EOS, without the end of a turn: those that are given, else the model's."""
        return listed(self.eos_id) or config.eos_ids

    def end_ids(self, config: ModelConfig) -> tuple[int, ...]:
        """The ids that end the answer: those that are given, else all that the model declares."""
        return listed(self.eos_id) or config.end_ids


OPTIONS = options_of(Request)
KEYWORDS = (*OPTIONS, "embeddings", "prefix")  # of a request in the Python interface
assert set(KEYWORDS) < {item.name for item in fields(Request)}


def flat_ids(prompt: Any) -> NDArray[Any]:
    """The integer array [P] that a caller's ids make; raises PromptError for anything else."""
    try:
        ids = np.asarray(prompt)
    except ValueError as error:
        raise PromptError("prompt ids are not one flat list; write them as [1, 2, 3]") from error
    if ids.ndim != 1 or ids.size == 0:
        what = "empty" if ids.size == 0 else f"not one flat list but of shape {list(ids.shape)}"
        raise PromptError(f"the prompt is {what}; it needs at least one id, as in [1, 2, 3]")
    if not np.issubdtype(ids.dtype, np.integer):
        raise PromptError(f"prompt ids must be integers, got {ids.dtype}; write them as [1, 2, 3]")
    return ids


def prompt_array(prompt: Any, model: Model, gen_length: int, embedded: int = 0) -> Positions:
    """The prompt's ids as int64 [P], checked against the model.

    The ids of `embedded` rows lie beyond the vocabulary. Raises PromptError for ids
    that cannot be decoded, OptionError for a `gen_length` beyond the bundle's length.
    """
    ids = flat_ids(prompt)
    check_ids(ids, model.config.vocab + embedded)
    if (ids == model.config.mask_id).any():
        raise PromptError(
            f"the prompt contains the mask id {model.config.mask_id}, which only decoding may place; leave it out"
        )
    OPTIONS["gen_length"].check(gen_length, model.capacity.max_length, "the bundle's length")
    check_length(len(ids), gen_length, model)
    return ids.astype(np.int64)


def canvas_array(ids: Any, canvas: Canvas, model: Model, embedded: int = 0) -> Positions:
    """The ids of a canvas as int64 [P], checked against the model and the holes.

    Raises PromptError for ids that cannot be decoded, or masks that are not those of the holes.
    """
    given = flat_ids(ids)
    check_ids(given, model.config.vocab + embedded)
    found: Positions = given.astype(np.int64)
    masks = np.flatnonzero(found == model.config.mask_id)
    if not len(masks) or not np.array_equal(masks, np.concatenate([np.array(span) for span in canvas.spans])):
        raise PromptError(
            f"a canvas has {len(masks)} masks at other places than its holes; give at least one hole, and no mask "
            "elsewhere"
        )
    check_length(len(found), 0, model)
    return found


def check_canvas(request: Request, policy: Policy, model: Model) -> None:
    """Raise OptionError for what cannot be done with a canvas."""
    if model.config.block_length is not None:
        raise OptionError(
            "a canvas needs full attention, and this model's is block-causal: no token sees those behind its block; "
            "use generate"
        )
    for name, value in (("stop", request.stop), ("grow", getattr(policy, "grow", False))):
        if value:
            raise OptionError(f"{name} has no meaning in a canvas, whose holes end by themselves; leave it out")
    if hasattr(policy, "block_length") and getattr(policy, "steps", None) is not None:
        raise OptionError(
            "steps are spread over blocks of equally many masks, which a canvas does not have; give a threshold, or "
            "leave steps out for one commit a step"
        )


def check_length(prompt_length: int, gen_length: int, model: Model) -> None:
    """Raise PromptError for a prompt and an answer of more positions than the bundle has."""
    limit = model.capacity.max_length
    if prompt_length + gen_length > limit:
        raise PromptError(
            f"{prompt_length} prompt ids and gen_length {gen_length} exceed the bundle's length {limit}; "
            f"shorten one of them{model.bundle.enlarge('--max-length', prompt_length + gen_length)}"
        )


def check_capacity(policy: Policy, model: Model) -> None:
    """Raise OptionError for a policy that asks for more than the bundle was built for."""
    for name in ("window", "track_num"):
        value, limit = getattr(policy, name, None), getattr(model.capacity, name)
        if type(value) is int and value > limit:
            remedy = model.bundle.enlarge(f"--{name.replace('_', '-')}", value)
            raise OptionError(f"{name} {value} exceeds {limit}, for which the bundle was built; give no more{remedy}")


def check_batch(size: int, model: Model) -> None:
    """Raise OptionError for more sequences side by side than the bundle was built for, or none."""
    limit = model.capacity.max_batch
    if not 1 <= size <= limit:
        remedy = model.bundle.enlarge("--max-batch", size) if size > limit else ""
        raise OptionError(f"a batch has 1 … {limit} prompts, as the bundle was built, and not {size}; split it{remedy}")


def unpadded(prompt: Any, attention_mask: Any) -> NDArray[Any]:
    """The ids [P] of a padded prompt [N] that `attention_mask` [N] marks by 1.

    Raises PromptError for a mask that does not fit the ids or has a gap.
    """
    ids, mask = flat_ids(prompt), np.asarray(attention_mask)
    if ids.shape != mask.shape:
        raise PromptError(
            f"attention_mask has shape {list(mask.shape)}, expected {list(ids.shape)} as the prompt's ids"
        )
    kept = np.flatnonzero(mask)
    if not np.isin(mask, (0, 1)).all() or (len(kept) and kept[-1] - kept[0] >= len(kept)):
        raise PromptError("attention_mask must be 1 for the prompt's ids and 0 for padding before or after them")
    return ids[kept]


def unlike_padding(prompt: Any, config: ModelConfig) -> NDArray[Any]:
    """The ids [P] of a prompt without a mask; raises PromptError for ids that begin or end with padding.

    Where padding is also an end, which may begin or end a text, one such id is allowed.
    """
    ids = flat_ids(prompt)
    pad = config.eos_id if config.pad_id is None else config.pad_id
    most = 1 if pad in (config.eos_id, *config.end_ids) else 0
    for side in (ids, ids[::-1]):
        if len(side) > most and (side[: most + 1] == pad).all():
            raise PromptError(
                f"the prompt ids begin or end with the padding id {pad}; leave the padding out, or give attention_mask"
            )
    return ids


def check_embeddings(embeddings: Any, model: Model) -> int:
    """The number n of rows [n, d]; raises PromptError unless they are finite floats of the model's width."""
    shape, kind = np.shape(embeddings), np.asarray(embeddings).dtype
    if len(shape) != 2 or shape[1] != model.config.d_model or not np.issubdtype(kind, np.floating):
        raise PromptError(
            f"embeddings must be floats of shape [n, {model.config.d_model}], got {kind} {list(shape)}; "
            "give one row for each id beyond the vocabulary"
        )
    if not np.isfinite(embeddings).all():
        raise PromptError("embeddings hold NaN or Inf, expected finite numbers; check what they come from")
    return len(embeddings)


def make_sampler(request: Request, policy: Policy, model: Model) -> Sampler:
    """The sampler of a request: which ids it excludes, how it draws tokens and ranks candidates."""
    config = model.config
    eos = request.eos_ids(config)
    late = eos if config.eot_id is None else (*eos, config.eot_id)
    return Sampler(
        excluded=(config.mask_id, *request.unused), ranking=policy.ranking, temperature=float(request.temperature),
        top_p=float(request.top_p), top_k=request.top_k, forbidden=eos if request.logits_eos_inf else (),
        suppressed=config.suppressed, late=late if request.confidence_eos_eot_inf else (), seed=request.seed,
    )  # fmt: skip


def check_request(request: Request, policy: Policy, model: Model, has_text: bool) -> None:
    """Check the options of a request, apart from its prompt; raises OptionError."""
    vocab = model.config.vocab
    limits = {"top_k": (vocab, "the vocabulary"), "eos_id": (vocab - 1, "the vocabulary")}
    if request.canvas is None:
        limits["gen_length"] = model.capacity.max_length, "the bundle's length"
    check_options(request, limits)
    sampled = request.temperature > 0
    if request.seed is not None and not (sampled or policy.ranking.by_chance):
        raise OptionError("a seed has no effect without temperature; give --temperature, or leave the seed out")
    if (request.top_p < 1 or request.top_k is not None) and not (sampled or policy.ranking.tempered):
        raise OptionError("top_p and top_k have no effect without temperature; give --temperature, or leave them out")
    stops = listed(request.stop)
    if stops and not (all(stops) and has_text):
        why = "the bundle has no tokenizer to compare text" if all(stops) else "it is empty"
        raise OptionError(f"stop cannot be used: {why}; give a text to stop at, or leave it out")
