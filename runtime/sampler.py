"""From predictions to commits: which candidates are taken, and sampling with temperature.

Knows neither positions nor devices: arrays in, indices out.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def choose(confidence: Floats, threshold: float | None, commits: int | None) -> NDArray[np.int64]:
    """Indices of the candidates to commit, ascending.

    With `commits` = k the k most confident; else each with confidence >=
    min(threshold, the highest), so at least one. Ties go to the lowest index.
    """
    if commits is not None:
        best = np.argsort(-confidence, kind="stable")[:commits]
        return np.sort(best)
    assert threshold is not None
    return np.flatnonzero(confidence >= min(threshold, float(confidence.max())))


def margin(confidence: Floats, threshold: float | None, commits: int | None) -> float:
    """How far the nearest candidate is from being chosen otherwise: tells float noise from error."""
    ranked = sorted(confidence.tolist(), reverse=True)  # of a handful of numbers, quicker than in an array
    if commits is not None:
        return float(ranked[commits - 1] - ranked[commits]) if commits < len(ranked) else 1.0
    assert threshold is not None
    bar = min(threshold, ranked[0])
    return float(min((abs(other - bar) for other in ranked[1:]), default=1.0))


def sample(
    logits: Floats, mask_id: int, temperature: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], Floats]:
    """Tokens and their probabilities for logits [W, V], with Gumbel noise in float64.

    arg-max of logits − T·log(−log u), u uniform: LLaDA's exp(logits) / (−log u)^T,
    on the log scale. [MASK] is never drawn. The confidence is the token's
    softmax probability without temperature, over all columns.
    """
    wide = logits.astype(np.float64)
    uniform = np.maximum(rng.random(wide.shape), np.finfo(np.float64).tiny)
    noisy = wide - temperature * np.log(-np.log(uniform))
    noisy[:, mask_id] = -np.inf
    token = noisy.argmax(-1)
    peak = wide.max(-1, keepdims=True)
    total = np.exp(wide - peak).sum(-1)
    return token, np.exp(np.take_along_axis(wide - peak, token[:, None], -1)[:, 0]) / total
