"""Choosing what to commit, and sampling: arrays in, indices out."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.decoding.sampler import LAST, Ranking, Sampler, choose, filtered, margin

confidences = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20).map(lambda c: np.array(c, np.float32))
thresholds = st.floats(0.01, 1)


def choice(confidence: list[float], threshold: float | None = None, commits: int | None = None) -> list[int]:
    return list(map(int, choose(np.array(confidence, np.float32), threshold, commits)))


def test_choose_by_threshold() -> None:
    assert choice([0.2, 0.9, 0.95, 0.5], 0.9) == [1, 2], "equal is enough"
    assert choice([0.2, 0.3, 0.25], 0.9) == [1], "at least the best"
    assert choice([0.3, 0.3, 0.1], 0.9) == [0, 1], "and its equals"
    assert choice([1.0, 1.0], 1.0) == [0, 1]


def test_choose_by_count() -> None:
    assert choice([0.2, 0.9, 0.95, 0.5], commits=2) == [1, 2]
    assert choice([0.9, 0.2, 0.95, 0.5], commits=3) == [0, 2, 3], "ascending, whatever the confidence"
    assert choice([0.5, 0.7, 0.5, 0.5], commits=2) == [0, 1], "ties go to the lowest index"
    assert choice([0.5, 0.7], commits=5) == [0, 1], "no more than there are"


@given(confidences, thresholds)
def test_the_threshold_rule(confidence: np.ndarray, threshold: float) -> None:
    taken = choose(confidence, threshold, None)
    best = confidence.max()
    assert len(taken) >= 1 and sorted(set(taken.tolist())) == taken.tolist()
    left = np.setdiff1d(np.arange(len(confidence)), taken)
    assert (confidence[taken] >= min(np.float32(threshold), best)).all()
    assert (confidence[left] < min(np.float32(threshold), best)).all()


@given(confidences, st.integers(1, 25))
def test_the_count_rule(confidence: np.ndarray, commits: int) -> None:
    taken = choose(confidence, None, commits)
    assert len(taken) == min(commits, len(confidence)) and sorted(set(taken.tolist())) == taken.tolist()
    left = np.setdiff1d(np.arange(len(confidence)), taken)
    if len(left):
        assert confidence[taken].min() >= confidence[left].max()


@given(confidences, thresholds, st.integers(1, 25), st.booleans(), st.randoms(use_true_random=False))
def test_a_margin_is_a_margin(confidence: np.ndarray, threshold: float, commits: int, by_count: bool, rng: Any) -> None:
    """Noise of less than half the margin changes no decision (the best candidate among equals aside)."""
    rule = (None, commits) if by_count else (threshold, None)
    distance = margin(confidence, *rule)
    assert 0 <= distance <= 1
    exact = confidence.astype(np.float64)
    noise = np.array([rng.uniform(-0.49, 0.49) * distance for _ in exact])
    if distance > 1e-6:
        assert choose(exact + noise, *rule).tolist() == choose(exact, *rule).tolist()


def test_margins() -> None:
    confidence = np.array([0.5, 0.875, 0.75])
    assert margin(confidence, None, 1) == 0.125 and margin(confidence, None, 2) == 0.25
    assert margin(confidence, None, 3) == 1.0, "all are taken: nothing can flip"
    assert margin(confidence, 0.625, None) == 0.125, "0.5 and 0.75 are as near; the best is taken in any case"
    assert margin(np.array([0.3]), 0.9, None) == 1.0


# Sampling


def test_same_seed_same_tokens() -> None:
    logits = np.random.default_rng(1).normal(size=(6, 50)).astype(np.float32)
    first, again, other = (Sampler((49,), temperature=1.0, seed=seed).draw(logits) for seed in (5, 5, 6))
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_tokens_are_drawn_from_the_softmax(temperature: float) -> None:
    """20,000 draws: frequencies within five standard errors of softmax(logits / T), [MASK] left out."""
    logits = np.array([1.0, -0.5, 0.25, 2.0, 9.0], np.float32)  # the last is [MASK], by far the likeliest
    count = 20_000
    token, _ = Sampler((4,), temperature=temperature, seed=0).draw(np.tile(logits, (count, 1)))
    wanted = np.exp(logits[:4].astype(np.float64) / temperature)
    wanted /= wanted.sum()
    found = np.bincount(token, minlength=5) / count
    assert found[4] == 0, "[MASK] is never drawn"
    error = np.sqrt(wanted * (1 - wanted) / count)
    print(f"T={temperature}: wanted {wanted.round(4)}, found {found[:4].round(4)}")
    assert (np.abs(found[:4] - wanted) < 5 * error).all()


def test_without_noise_it_is_the_arg_max() -> None:
    logits = np.random.default_rng(2).normal(size=(8, 30)).astype(np.float32)
    logits[:, 7] = 100
    token, _ = Sampler((7,)).draw(logits)
    allowed = np.delete(logits, 7, axis=1).argmax(-1)
    assert np.array_equal(token, allowed + (allowed >= 7))


def test_confidence_is_the_softmax_without_temperature() -> None:
    """Over all columns, [MASK] included, and safe for large logits."""
    logits = np.array([[2.0, 1.0, 3.0], [2000.0, 1000.0, 1999.0]], np.float32)
    token, confidence = Sampler((2,), temperature=0.5, seed=3).draw(logits)
    wide = logits.astype(np.float64)
    softmax = np.exp(wide - wide.max(-1, keepdims=True))
    softmax /= softmax.sum(-1, keepdims=True)
    assert np.allclose(confidence, softmax[[0, 1], token], rtol=1e-12)
    assert set(token.tolist()) <= {0, 1}


LOGITS = np.log(np.array([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.26, 0.24]]))


def test_top_k_and_top_p() -> None:
    """The highest always stays; equals of the last stay too."""

    def kept(top_k: int | None, top_p: float) -> list[list[int]]:
        return [np.flatnonzero(np.isfinite(row)).tolist() for row in filtered(LOGITS, top_k, top_p)]

    assert kept(2, 1.0) == [[0, 1], [0, 1, 2]] and kept(4, 1.0) == kept(None, 1.0) == [[0, 1, 2, 3]] * 2
    assert kept(None, 0.6) == [[0, 1], [0, 1, 2]], "the fewest that together have more"
    assert kept(None, 1e-9) == [[0], [2]]
    assert kept(1, 0.5) == [[0], [2]]
    tokens, _ = Sampler((3,), temperature=5.0, top_k=1, seed=0).draw(np.tile(LOGITS, (50, 1)))
    assert set(tokens.tolist()) == {0, 2}
    masked, _ = Sampler((0,), temperature=1.0, top_p=0.1, seed=0).draw(LOGITS)
    assert masked.tolist() == [1, 2], "[MASK] leaves before the filter, so that something is left"


def test_rankings() -> None:
    def ranks(kind: str) -> Any:
        return Sampler((3,), Ranking(kind)).draw(LOGITS)[1]

    assert np.allclose(ranks("probability"), [0.5, 0.26]) and np.allclose(ranks("margin"), [0.2, 0.01])
    probabilities = np.exp(LOGITS)
    assert np.allclose(ranks("entropy"), (probabilities * np.log(probabilities)).sum(-1))
    first, again = (Sampler((3,), Ranking("random"), seed=4).draw(LOGITS)[1] for _ in range(2))
    assert np.array_equal(first, again) and len(set(first.tolist())) == 2


def test_a_tempered_ranking_sees_what_was_drawn_from() -> None:
    _, plain = Sampler((), Ranking(), temperature=0.5, seed=1).draw(LOGITS)
    tokens, tempered = Sampler((), Ranking(tempered=True), temperature=0.5, seed=1).draw(LOGITS)
    sharpened = np.exp(2 * LOGITS) / np.exp(2 * LOGITS).sum(-1, keepdims=True)
    assert np.allclose(tempered, sharpened[[0, 1], tokens])
    assert np.allclose(plain, np.exp(LOGITS)[[0, 1], tokens])


def test_hidden_and_late_tokens() -> None:
    sampler = Sampler((3,), forbidden=(0,), late=(2,))
    tokens, confidence = sampler.draw(LOGITS)
    assert tokens.tolist() == [1, 2] and np.allclose(confidence, [0.6, 0.26 / 0.75])
    assert sampler.order(tokens, confidence).tolist() == [confidence[0], LAST]
    assert choose(sampler.order(tokens[1:], confidence[1:]), 0.9, None).tolist() == [0], "late, but not never"
    assert not sampler.greedy and Sampler((3,), late=(2,)).greedy


def test_drawing_by_rank() -> None:
    """k of n without replacement, likelier where the rank is higher."""
    sampler = Sampler((), Ranking(temperature=1.0), seed=0)
    counts = np.zeros(3)
    for _ in range(2000):
        ranks = sampler.order(np.zeros(3, np.int64), np.log([0.7, 0.2, 0.1]))
        counts[choose(ranks, None, 1)] += 1
    print(counts / 2000)
    assert (np.abs(counts / 2000 - [0.7, 0.2, 0.1]) < 5 * np.sqrt(0.21 / 2000)).all()


def test_rows_are_drawn_in_order_however_many() -> None:
    logits = np.random.default_rng(0).normal(size=(150, 9))
    whole = Sampler((8,), temperature=1.0, seed=3).draw(logits)
    again = Sampler((8,), temperature=1.0, seed=3)
    parts = [again.draw(rows) for rows in (logits[:64], logits[64:128], logits[128:])]
    assert np.array_equal(whole[0], np.concatenate([tokens for tokens, _ in parts]))
