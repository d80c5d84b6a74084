"""Log-likelihoods against an enumeration of all masks, and greedy answers against the published loop."""

import math
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import export
import runtime
from engines.errors import PromptError
from engines.model import Model
from runtime.decoding.sequence import Positions
from runtime.evaluation.likelihood import all_masks, drawn_masks, is_greedy, log_likelihood
from tests.support.cases import DATA, refused

RNG = np.random.default_rng(5)
IDS = RNG.integers(0, 40, 40)


@pytest.fixture(scope="module", params=["onnxruntime", "eager", "dream"])
def model(
    request: pytest.FixtureRequest, golden_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Model]:
    """The golden model on two back ends, and one whose rows predict the next position."""
    bundle, backend = golden_bundle, request.param
    if backend == "dream":
        bundle, backend = export.build(DATA / "dream-tiny", tmp_path_factory.mktemp("dream") / "b"), "onnxruntime"
    with runtime.load(bundle, backend, threads=1) as loaded:
        yield loaded.model


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    return wide - np.logaddexp.reduce(wide, axis=-1, keepdims=True)  # type: ignore[no-any-return]


def weighed(model: Model, context: Positions, answer: Positions, hidden: tuple[int, ...]) -> float:
    """L/k times the log-probabilities of the answer's tokens where those numbered `hidden` are masks."""
    ids = np.concatenate([context, answer])
    places = [len(context) + index for index in hidden]
    ids[places] = model.config.mask_id
    found = log_softmax(model.logits(ids)[0])
    rows = [max(place - model.config.shift, 0) for place in places]
    total = sum(found[row, answer[index]] for row, index in zip(rows, hidden, strict=True))
    return float(total * len(answer) / len(hidden))


def enumerated(model: Model, context: Positions, answer: Positions) -> tuple[float, float]:
    """The estimate's expectation and its deviation for one drawn mask: sizes are uniform, then the masks of a size."""
    length = len(answer)
    values = [
        (1 / length / math.comb(length, size), weighed(model, context, answer, hidden))
        for size in range(1, length + 1) for hidden in combinations(range(length), size)
    ]  # fmt: skip
    mean = sum(chance * value for chance, value in values)
    return mean, math.sqrt(sum(chance * (value - mean) ** 2 for chance, value in values))


@pytest.mark.parametrize("start", [0, 1, 9])
def test_one_token_is_exact(model: Model, start: int) -> None:
    context, answer = IDS[:start], IDS[30:31]
    assert log_likelihood(model, context, answer) == pytest.approx(weighed(model, context, answer, (0,)), abs=1e-5)


@pytest.mark.parametrize("length", range(2, 7))
def test_up_to_six_tokens_are_those_of_all_masks(model: Model, length: int) -> None:
    context, answer = IDS[:7], IDS[20 : 20 + length]
    mean, deviation = enumerated(model, context, answer)
    assert log_likelihood(model, context, answer) == pytest.approx(mean, abs=1e-4)
    samples = 2**length - 2  # too few for all masks: they are drawn
    assert abs(log_likelihood(model, context, answer, samples) - mean) <= 3 * deviation / math.sqrt(samples)


def test_the_drawn_masks_are_distributed_as_all() -> None:
    masks, chances = all_masks(4)
    assert len(masks) == 15 and chances.sum() == pytest.approx(1.0)
    assert {mask.sum(): chance for mask, chance in zip(masks, chances, strict=True)} == pytest.approx(
        {1: 1 / 16, 2: 1 / 24, 3: 1 / 16, 4: 1 / 4}
    )
    found = dict.fromkeys(map(bytes, masks), 0.0)
    rounds, samples = 400, 12
    rng = np.random.default_rng(1)
    for _ in range(rounds):
        drawn, weights = drawn_masks(4, samples, rng)
        assert weights.sum() == pytest.approx(1.0)
        for mask, weight in zip(drawn, weights, strict=True):
            found[bytes(mask)] += weight / rounds
    for mask, chance in zip(masks, chances, strict=True):
        noise = math.sqrt(chance * (1 - chance) / rounds / samples)
        assert abs(found[bytes(mask)] - chance) < 4 * noise, mask  # 15 masks: 4 deviations are 1 in 1,000


def test_a_score_depends_on_its_request_alone(model: Model) -> None:
    pairs = [(IDS[:5], IDS[5:14]), (IDS[:6], IDS[6:14]), (IDS[3:5], IDS[5:14])]
    scores = [log_likelihood(model, *pair, 20) for pair in pairs]
    assert [log_likelihood(model, *pair, 20) for pair in reversed(pairs)] == scores[::-1]
    assert len(set(scores)) == 3 and max(scores) < 0


def published(model: Model, context: Positions, length: int) -> Positions:
    """Greedy decoding as published: all masks are predicted, the most confident one stays."""
    ids = np.concatenate([context, np.full(length, model.config.mask_id)])
    for _ in range(length):
        masked = np.flatnonzero(ids == model.config.mask_id)
        found = log_softmax(model.logits(ids)[0])[np.maximum(masked - model.config.shift, 0)]
        best = found.max(-1).argmax()
        ids[masked[best]] = found[best].argmax()
    return ids[len(context) :]


def test_greedy_answers(model: Model) -> None:
    for context in (IDS[:9], IDS[10:22], IDS[:0]):
        answer = published(model, context, 5)
        assert model.config.mask_id not in answer, "else the loop would not have ended"
        assert is_greedy(model, context, answer)
        for place in range(5):
            other = answer.copy()
            other[place] = (other[place] + 1) % 40
            assert not is_greedy(model, context, other)
    assert is_greedy(model, IDS[:4], IDS[:0]) and log_likelihood(model, IDS[:4], IDS[:0]) == 0.0


def test_what_cannot_be_scored(model: Model) -> None:
    mask = np.array([1, model.config.mask_id])
    for call in (log_likelihood, is_greedy):
        for context, answer in ((mask, IDS[:2]), (IDS[:2], mask)):
            with refused(PromptError, "mask id", str(model.config.mask_id), "leave it out"):
                call(model, context, answer)
    with refused(PromptError, "exceed the bundle's length"):
        log_likelihood(model, np.tile(IDS, 100), IDS)
