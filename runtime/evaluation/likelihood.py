"""The log-likelihood of an answer, as LLaDA's published evaluation estimates it.

A masked diffusion model gives a bound (arXiv 2502.09992, equation 6; `get_log_likelihood` of ML-GSAI/LLaDA): the
expectation of L/k times the log-probabilities of the masked tokens, where the number k of masks is uniform in 1 … L
and the k masked tokens are any of the L. Where no more masks exist than are to be drawn, the expectation is computed;
otherwise masks are drawn, with a seed made from the ids.
"""

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

from engines.errors import PromptError
from engines.model import Model
from runtime.decoding.sequence import Positions

SAMPLES = 128  # masks, the published number
BATCH = 16  # sequences of one forward pass at most
NUMBERS = 2**26  # logits of one forward pass at most, unless one sequence has more

Masks = NDArray[np.bool_]
Reals = NDArray[np.float64]


def log_likelihood(model: Model, context: Positions, answer: Positions, samples: int = SAMPLES) -> float:
    """The estimated log-likelihood, in nats, of the ids `answer` [L] behind the ids `context` [C]; 0 for no ids.

    It is exact, which is to say the published estimate's expectation, where the 2^L - 1 masks are no more than
    `samples`. Raises PromptError for ids that hold the mask, lie outside the vocabulary or exceed the bundle's length.
    """
    check(model, context, answer)
    length = len(answer)
    if length == 0:
        return 0.0
    if 2**length - 1 <= samples:
        masks, weights = all_masks(length)
    else:
        content = str((context.tolist(), answer.tolist())).encode()
        seed = int.from_bytes(hashlib.sha256(content).digest(), "little")
        masks, weights = drawn_masks(length, samples, np.random.default_rng(seed))
    found = log_probabilities(model, context, answer, masks)
    return float(weights @ ((found * masks).sum(1) * length / masks.sum(1)))


def all_masks(length: int) -> tuple[Masks, Reals]:
    """All masks of `length` tokens but the empty one [n, L], and the probability of each [n]."""
    masks = (np.arange(1, 2**length)[:, None] >> np.arange(length)) & 1 == 1
    return masks, np.array([1 / (length * math.comb(length, count)) for count in masks.sum(1).tolist()])


def drawn_masks(length: int, samples: int, rng: np.random.Generator) -> tuple[Masks, Reals]:
    """Masks drawn as published, each once [n, L], and the fraction of the draws that are it [n].

    The numbers of masked tokens are spread evenly over 1 … L from one that is drawn, so that each is uniform.
    """
    first = int(rng.integers(length))
    sizes = (first + np.arange(samples) * length // samples) % length + 1
    drawn = rng.permuted(np.arange(length) < sizes[:, None], axis=1)
    masks, counts = np.unique(drawn, axis=0, return_counts=True)
    return masks, counts / samples


def log_probabilities(model: Model, context: Positions, answer: Positions, masks: Masks) -> Reals:
    """The log-probability of each token of `answer` where `masks` [n, L] hide some: [n, L]."""
    rows = logits_rows(model, len(context) + np.arange(len(answer)))
    hidden = np.where(masks, model.config.mask_id, answer)
    ids = np.concatenate([np.broadcast_to(context, (len(masks), len(context))), hidden], axis=1)
    size = max(1, min(BATCH, NUMBERS // (len(answer) * model.config.vocab)))
    found = []
    for start in range(0, len(ids), size):
        logits = model.logits(ids[start : start + size], rows)
        highest = logits.max(-1, keepdims=True)
        total = np.exp(logits - highest).sum(-1, dtype=np.float64)
        found.append((logits - highest)[:, np.arange(len(answer)), answer] - np.log(total))
    return np.concatenate(found)


def is_greedy(model: Model, context: Positions, answer: Positions) -> bool:
    """Whether `answer` [L] is what greedy decoding gives: L masks, of which the most confident is filled at a time.

    Ends at the first token that differs, as it stays. Raises what `log_likelihood` does.
    """
    check(model, context, answer)
    ids = np.concatenate([context, np.full(len(answer), model.config.mask_id)])
    masked = len(context) + np.arange(len(answer))
    while len(masked):
        logits = model.logits(ids, logits_rows(model, masked))[0]
        highest = logits.max(-1, keepdims=True)
        confidence = 1 / np.exp(logits - highest).sum(-1, dtype=np.float64)
        best = int(confidence.argmax())
        position, token = masked[best], int(logits[best].argmax())
        if token != answer[position - len(context)]:
            return False
        ids[position] = token
        masked = np.delete(masked, best)
    return True


def logits_rows(model: Model, positions: Positions) -> Positions:
    """The rows whose logits predict `positions` [n]: in a shifted model those before, and position 0 by its own."""
    rows: Positions = np.maximum(positions - model.config.shift, 0)
    return rows


def check(model: Model, context: Positions, answer: Positions) -> None:
    """Raise PromptError where an id is the mask."""
    if model.config.mask_id in context or model.config.mask_id in answer:
        raise PromptError(f"a text to score contains the mask id {model.config.mask_id}; leave it out")
