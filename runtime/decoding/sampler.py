"""From predictions to commits: tokens, their ranks, and which candidates are committed. Arrays in, indices out."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Tokens = NDArray[np.int64]
LAST = -1e9  # lower than any rank, yet finite: margins are differences
CHUNK = 64  # rows sampled at a time, to bound the memory of float64 logits of a large vocabulary


def choose(confidence: Floats, threshold: float | None, commits: int | None) -> NDArray[np.int64]:
    """Indices of the candidates to commit, ascending.

    With `commits` = k the k most confident; else each with confidence >=
    min(threshold, the highest), so at least one. With both, those that reach the
    threshold if they are at least k. Ties go to the lowest index.
    """
    if commits is not None and threshold is not None and (confidence >= threshold).sum() >= commits:
        commits = None
    if commits is not None:
        best = np.argsort(-confidence, kind="stable")[:commits]
        return np.sort(best)
    assert threshold is not None
    return np.flatnonzero(confidence >= min(threshold, float(confidence.max())))


def margin(confidence: Floats, threshold: float | None, commits: int | None) -> float:
    """The smallest change of one confidence that would change the choice, 1.0 if none would.

    If it is below float noise, back ends may differ.
    """
    ranked = sorted(confidence.tolist(), reverse=True)  # for few numbers faster than an array
    if commits is not None and threshold is not None:
        reach = sum(value >= threshold for value in ranked)
        if reach >= commits:
            return min((abs(value - threshold) for value in ranked), default=1.0)
        nearest = threshold - ranked[commits - 1] if commits <= len(ranked) else 1.0
        return min(nearest, margin(confidence, None, commits))
    if commits is not None:
        return float(ranked[commits - 1] - ranked[commits]) if 0 < commits < len(ranked) else 1.0
    assert threshold is not None
    bar = min(threshold, ranked[0])
    return float(min((abs(other - bar) for other in ranked[1:]), default=1.0))


@dataclass(frozen=True)
class Ranking:
    """By what a policy ranks candidates.

    `kind`: the token's `probability`, its `margin` over the second most probable
    token, the negative `entropy` of all, or `random` numbers. With a
    `temperature` ranks are drawn instead: k candidates without replacement, with
    probabilities softmax(rank / temperature). `tempered` takes the probabilities
    after temperature, top-k and top-p, as the token is drawn; else before.
    """

    kind: str = "probability"
    temperature: float = 0.0
    tempered: bool = False

    @property
    def by_chance(self) -> bool:
        """Whether ranks are random, so that a seed has an effect."""
        return self.kind == "random" or self.temperature > 0


@dataclass
class Sampler:
    """Draws tokens from logits and ranks the candidates.

    `excluded` ids are never drawn, but count in the softmax. `forbidden` ids have
    logits of minus infinity, so they have no probability either; `suppressed` ids
    likewise, which the model's head leaves out itself. Candidates whose token is one of
    `late` rank lowest. Everything random comes from `seed`.
    """

    excluded: tuple[int, ...]
    ranking: Ranking = field(default_factory=Ranking)
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    forbidden: tuple[int, ...] = ()
    suppressed: tuple[int, ...] = ()
    late: tuple[int, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.never = frozenset(self.excluded)

    def allows(self, tokens: Tokens) -> bool:
        """Whether none of `tokens` [W] is excluded."""
        return self.never.isdisjoint(tokens.tolist())

    @property
    def greedy(self) -> bool:
        """Whether the arg-max and its probability suffice, which the head computes."""
        drawn = self.temperature > 0 or self.filters or self.ranking.by_chance
        return not drawn and self.ranking.kind == "probability" and not self.forbidden

    @property
    def filters(self) -> bool:
        """Whether top-k or top-p restricts the tokens that can be drawn."""
        return self.top_p < 1 or self.top_k is not None

    def draw(self, logits: Floats) -> tuple[Tokens, Floats]:
        """Tokens [W] and their ranks [W] in float64, for logits [W, V].

        At temperature 0 a token is the arg-max, else a sample of softmax(logits / temperature).
        """
        chunks = [self._draw(logits[row : row + CHUNK]) for row in range(0, len(logits), CHUNK)]
        tokens, ranks = map(np.concatenate, zip(*chunks, strict=True))
        return tokens, ranks

    def _draw(self, logits: Floats) -> tuple[Tokens, Floats]:
        plain: Floats = logits.astype(np.float64)
        plain[:, [*self.forbidden, *self.suppressed]] = -np.inf
        tempered = plain / self.temperature if self.temperature else plain
        allowed: Floats = tempered.copy()
        allowed[:, list(self.excluded)] = -np.inf
        if self.filters:
            allowed = filtered(allowed, self.top_k, self.top_p)
            tempered = allowed
        tokens = (allowed + self.noise(allowed.shape) if self.temperature else allowed).argmax(-1)
        return tokens, self.rank(tokens, tempered if self.ranking.tempered else plain)

    def noise(self, shape: int | tuple[int, ...]) -> Floats:
        """Gumbel noise in float64: the arg-max of logits plus noise is a sample of their softmax."""
        uniform = np.maximum(self.rng.random(shape), np.finfo(np.float64).tiny)
        noise: Floats = -np.log(-np.log(uniform))
        return noise

    def rank(self, tokens: Tokens, logits: Floats) -> Floats:
        """The rank [W] of each of `tokens` [W] by the policy's ranking; logits [W, V]."""
        if self.ranking.kind == "random":
            return self.rng.random(len(tokens))
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities = odds / odds.sum(-1, keepdims=True)
        if self.ranking.kind == "margin":
            second, first = np.partition(probabilities, -2, axis=-1)[:, -2:].T
            return np.asarray(first - second)
        if self.ranking.kind == "entropy":
            return np.asarray((probabilities * np.log(probabilities + 1e-10)).sum(-1))
        return np.asarray(np.take_along_axis(probabilities, tokens[:, None], -1)[:, 0])

    def order(self, tokens: Tokens, ranks: Floats) -> Floats:
        """The ranks [W] by which candidates are committed: noisy under a ranking temperature, late tokens lowest."""
        if self.ranking.temperature:
            ranks = np.add(ranks / self.ranking.temperature, self.noise(len(ranks)))
        return np.where(np.isin(tokens, self.late), LAST, ranks) if self.late else ranks


def filtered(logits: Floats, top_k: int | None, top_p: float) -> Floats:
    """Logits [W, V] with minus infinity for all but the `top_k` highest, then for all but the fewest whose
    probabilities add up to more than `top_p`; the highest always stays."""
    if top_k is not None and top_k < logits.shape[-1]:
        bar = np.partition(logits, -top_k, axis=-1)[:, -top_k, None]
        logits = np.where(logits < bar, -np.inf, logits)
    if top_p < 1:
        order = np.argsort(-logits, axis=-1, kind="stable")
        ranked = np.take_along_axis(logits, order, -1)
        odds = np.exp(ranked - ranked[:, :1])
        before = np.cumsum(odds / odds.sum(-1, keepdims=True), axis=-1)
        beyond = np.roll(before > top_p, 1, axis=-1)
        beyond[:, 0] = False
        ranked = np.where(beyond, -np.inf, ranked)
        logits = np.empty_like(ranked)
        np.put_along_axis(logits, order, ranked, -1)
    return logits
