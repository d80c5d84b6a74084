"""One request from prompt to answer: what is refused before the first step, and what comes out of the last."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import runtime
from engines.errors import OptionError, PromptError
from engines.options import UNSET
from runtime.decoding.policies import FULL_ATTENTION
from runtime.decoding.sequence import Sequence
from tests.support.cases import refused
from tests.support.comparison import BACKENDS

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def texts(text_bundle: Path) -> Any:
    with runtime.load(text_bundle, "onnxruntime", threads=1) as model:
        yield model


# Requests that are refused


@pytest.mark.parametrize(
    ("prompt", "words"),
    [([], ("empty", "at least one id")), (np.zeros(0, np.int64), ("empty", "at least one id")),
     ([[1, 2]], ("flat list", "[1, 2]")), ([[1], [2, 3]], ("flat list", "[1, 2, 3]")), (5, ("flat list",)),
     ([1.0], ("integers", "float64", "[1, 2, 3]")), (["a"], ("integers", "[1, 2, 3]")), ([True], ("integers", "bool")),
     ([3, 256], ("id 256", "vocabulary of 256", "check the tokenizer")),
     ([3, -1], ("id -1", "vocabulary of 256", "check the tokenizer")),
     ([3, 255, 4], ("mask id 255", "leave it out")),
     ([1] * 505, ("505 prompt ids", "gen_length 8", "length 512", "shorten"))],
)  # fmt: skip
def test_prompts(golden: runtime.Runtime, prompt: Any, words: tuple[str, ...]) -> None:
    with refused(PromptError, *words):
        golden.generate(prompt, gen_length=8)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"gen_length": 0}, ("gen_length", "1 … 512", "0")), ({"gen_length": 513}, ("gen_length", "1 … 512", "513")),
     ({"gen_length": 2.5}, ("gen_length", "2.5")), ({"temperature": -0.5}, ("temperature", "from 0 up", "-0.5")),
     ({"temperature": float("nan")}, ("temperature", "nan")), ({"temperature": float("inf")}, ("temperature", "inf")),
     ({"top_p": 0.0, "temperature": 1.0}, ("top_p", "(0, 1]", "0.0")), ({"top_p": 0.5}, ("top_p", "temperature")),
     ({"top_k": 0, "temperature": 1.0}, ("top_k", "1 … 256", "0")), ({"top_k": 5}, ("top_k", "no effect")),
     ({"temperature": "hot"}, ("temperature", "hot")),
     ({"seed": 1}, ("seed", "no effect without temperature", "--temperature", "leave")),
     ({"seed": 1, "temperature": 0.0}, ("seed", "no effect without temperature")),
     ({"seed": -1, "temperature": 1.0}, ("seed", "0 …", "-1")),
     ({"seed": 2**64, "temperature": 1.0}, ("seed", str(2**64))), ({"seed": 0.5, "temperature": 1.0}, ("seed", "0.5")),
     ({"eos_id": 256}, ("eos_id", "0 … 255", "vocabulary", "256")), ({"eos_id": -1}, ("eos_id", "-1")),
     ({"stop": "x"}, ("stop", "no tokenizer", "leave it out")),
     ({"window": 33}, ("window 33", "exceeds 32", "--window 33")), ({"track_num": 5}, ("track_num 5", "exceeds 4")),
     ({"threshold": 0.0}, ("threshold", "(0, 1]")), ({"gamma": 2.0}, ("gamma", "0.0 … 1.0", "2.0")),
     ({"policy": "full", "window": 4}, ("policy full does not use window", "its options are")),
     ({"policy": "dual", "block_length": 9}, ("block_length", "1 … 8", "9")), ({"colour": 1}, ("colour",)),
     ({"policy": "plastic"}, ("plastic", "choose from"))],
)  # fmt: skip
def test_options(golden: runtime.Runtime, options: dict[str, Any], words: tuple[str, ...]) -> None:
    with refused(OptionError, *words):
        golden.generate(PROMPT, **{"gen_length": 8, **options})


def test_an_empty_stop(texts: runtime.Runtime) -> None:
    with refused(OptionError, "stop", "empty", "leave it out"):
        texts.generate("Hi", gen_length=8, stop="")


def test_nothing_runs_before_a_refusal(golden: runtime.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(golden.model), "new_runner", lambda *_: pytest.fail("memory was taken"))
    for prompt, options in (([], {}), (PROMPT, {"window": 99}), (PROMPT, {"temperature": -1.0})):
        with pytest.raises((PromptError, OptionError)):
            golden.generate(prompt, gen_length=8, **options)


def test_the_longest_that_fits(golden: runtime.Runtime) -> None:
    out = golden.generate([1] * 500, gen_length=12, policy="full", steps=1, block_length=12)
    assert out.steps == 1 and len(out.sequence) == 512


# Options of the published decoders


def test_guidance_moves_away_from_what_the_prompt_does_not_say(golden: runtime.Runtime) -> None:
    """One commit: the arg-max of un + (s + 1) · (logits − un), as two plain forwards have them."""
    ids = np.array([PROMPT + [255] * 4])
    blind = np.where(np.arange(12) < 8, 255, ids)
    seen, unseen = golden.logits(ids)[0, 8:], golden.logits(blind)[0, 8:]
    for scale in (0.5, 1.5):
        wanted = (unseen + (scale + 1) * (seen - unseen)).astype(np.float64)
        wanted[:, 255] = -np.inf
        for policy in ("full", "timesteps"):
            out = golden.generate(PROMPT, policy, gen_length=4, steps=1, cfg_scale=scale, stop_at_eos=False)
            assert out.ids == wanted.argmax(-1).tolist() and out.steps == 1
    with refused(OptionError, "policy elastic does not use cfg_scale"):
        golden.generate(PROMPT, gen_length=4, cfg_scale=1.0)


@pytest.mark.parametrize("policy", FULL_ATTENTION)
def test_an_end_that_is_never_said_or_last(golden: runtime.Runtime, policy: str) -> None:
    free = golden.generate(PROMPT, policy, gen_length=16, stop_at_eos=False)
    end = free.ids[5]
    never = golden.generate(PROMPT, policy, gen_length=16, eos_id=end, logits_eos_inf=True)
    assert end not in never.sequence[8:] and never.eos_at is None
    late = golden.generate(PROMPT, policy, gen_length=16, eos_id=end, confidence_eos_eot_inf=True, stop_at_eos=False)
    for event in late.trace:
        assert end not in event.tokens or set(event.tokens) == {end} or event.committed == event.window


def test_random_remasking(golden: runtime.Runtime) -> None:
    """An order drawn by chance, as many commits a step as ever; its seed fixes it."""
    options: dict[str, Any] = {"gen_length": 16, "steps": 8, "block_length": 8, "remasking": "random"}
    first, again, other = (golden.generate(PROMPT, "full", seed=seed, **options) for seed in (1, 1, 2))
    assert first.sequence == again.sequence and [len(e.committed) for e in first.trace] == [2] * 8
    assert [e.committed for e in first.trace] != [e.committed for e in other.trace]


def test_masks_by_chance(golden: runtime.Runtime) -> None:
    out = golden.generate(PROMPT, "timesteps", gen_length=16, steps=8, alg="origin", seed=3, stop_at_eos=False)
    counts = [len(event.committed) for event in out.trace]
    assert sum(counts) == 16 and out.steps <= 8 and 255 not in out.sequence and len(set(counts)) > 1
    drawn = golden.generate(
        PROMPT, "timesteps", gen_length=16, alg="entropy", alg_temp=0.5, temperature=0.7, top_p=0.9, seed=3
    )
    assert 255 not in drawn.sequence


# Embeddings in place of ids


@pytest.mark.slow
@pytest.mark.parametrize("policy", FULL_ATTENTION)
@pytest.mark.parametrize("backend", BACKENDS)
def test_given_embeddings_are_as_good_as_ids(golden_bundle: Path, policy: str, backend: str) -> None:
    """A prompt in which some ids are replaced by their own rows of the table: the same run, whatever the policy."""
    table = load_file(next(golden_bundle.glob("onnx/embed*.safetensors")))["wte.weight"]
    ids = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    swapped = ids.copy()
    swapped[2:7] = 256 + np.arange(5)
    with runtime.load(golden_bundle, backend, threads=1) as model:
        plain = model.generate(ids, policy, gen_length=24)
        given = model.generate(swapped, policy, gen_length=24, embeddings=table[ids[2:7]])
        again = model.generate_batch([swapped, ids[:3].tolist()], policy, gen_length=24, embeddings=table[ids[2:7]])
    assert given.sequence[10:] == again[0].sequence[10:] == plain.sequence[10:] and given.steps == plain.steps
    assert [e.tracked for e in given.trace] == [e.tracked for e in plain.trace]


@pytest.mark.parametrize(
    ("embeddings", "words"),
    [(np.zeros((2, 3)), ("[n, 64]", "[2, 3]")), (np.zeros((2, 64), int), ("floats", "int64")),
     (np.full((2, 64), np.nan), ("NaN", "finite")), (np.zeros((1, 64)), ("id 257", "vocabulary of 257"))],
)  # fmt: skip
def test_embeddings_that_are_refused(golden: runtime.Runtime, embeddings: Any, words: tuple[str, ...]) -> None:
    with refused(PromptError, *words):
        golden.generate([1, 256, 257], gen_length=4, embeddings=embeddings)


# Answers


@pytest.mark.parametrize("policy", FULL_ATTENTION)
def test_an_answer(golden: runtime.Runtime, policy: str) -> None:
    """What the output says agrees with its own trace."""
    *first, out = golden.stream(np.array(PROMPT, np.int32), policy, gen_length=16)
    events = [event for event in first if isinstance(event, runtime.StepEvent)]
    assert isinstance(out, runtime.Output) and first == events == out.trace and out.steps == len(events) > 1
    ids = np.full(24, 255)
    ids[:8] = PROMPT
    for number, event in enumerate(events):
        assert event.step == number and event.seconds > 0
        assert len(event.committed) == len(event.tokens) == len(event.confidences) >= (policy != "timesteps")
        assert set(event.committed) <= set(event.window) <= set(np.flatnonzero(ids == 255).tolist())
        assert 0 < event.rows <= 4 * 24 and all(0 <= c <= 1.000001 for c in event.confidences)
        ids[event.committed] = event.tokens
    assert ids.tolist() == out.sequence and 255 not in out.sequence
    assert out.ids == out.sequence[8:] and out.tokens == 16 and out.eos_at is None
    assert out.computed_fraction == sum(e.rows for e in events) / (out.steps * 4 * 24) <= 1
    assert (out.computed_fraction == 1) == (policy in ("full", "timesteps"))
    assert out.seconds >= sum(e.seconds for e in events) > 0
    assert golden.generate(PROMPT, policy, gen_length=16).sequence == out.sequence, "the same again"


def test_the_json_of_an_output(golden: runtime.Runtime) -> None:
    out = golden.generate(PROMPT, gen_length=8)
    record = out.to_json()
    kept = {
        "ids",
        "text",
        "steps",
        "tokens",
        "seconds",
        "computed_fraction",
        "eos_at",
        "image_seconds",
        "ended",
        "prefix_rows",
        "tokens_per_second",
    }
    assert set(record) == kept
    assert record["tokens_per_second"] == out.tokens / out.seconds


def test_stopping_at_eos(golden: runtime.Runtime) -> None:
    """Another end token, one that this model does say: the answer is shorter, and what follows is not filled."""
    free = golden.generate(PROMPT, gen_length=16)
    end = free.ids[5]
    before = free.ids[: free.ids.index(end)]
    out = golden.generate(PROMPT, gen_length=16, eos_id=end)
    assert out.eos_at is not None and out.sequence[out.eos_at] == end
    assert out.ids == out.sequence[8 : 8 + out.tokens] and end not in out.ids and 255 not in out.ids
    assert out.tokens == len(out.ids) <= out.eos_at - 8 and out.steps <= free.steps
    on = golden.generate(PROMPT, gen_length=16, eos_id=end, stop_at_eos=False)
    assert on.eos_at is None and on.sequence == free.sequence and on.ids == before, (
        "filled to the end, cut all the same"
    )


def test_same_seed_same_tokens(golden: runtime.Runtime) -> None:
    def draw(seed: int | None, temperature: float = 1.5) -> list[int]:
        return golden.generate(PROMPT, gen_length=16, temperature=temperature, seed=seed).sequence

    assert draw(7) == draw(7) != draw(8)
    assert draw(2**64 - 1) == draw(2**64 - 1)
    assert len({tuple(draw(None)) for _ in range(3)}) > 1, "without a seed each run is another"
    assert golden.generate(PROMPT, gen_length=16, temperature=0.0).sequence != draw(7)


def test_a_little_noise_changes_little(golden: runtime.Runtime) -> None:
    """As the temperature goes to 0 the draws become the arg-max."""
    greedy = golden.generate(PROMPT, gen_length=16, policy="full", steps=16)
    for seed in range(3):
        cold = golden.generate(PROMPT, gen_length=16, policy="full", steps=16, temperature=1e-9, seed=seed)
        assert cold.sequence == greedy.sequence


@pytest.mark.parametrize("policy", FULL_ATTENTION)
def test_the_mask_is_never_drawn(golden: runtime.Runtime, policy: str) -> None:
    out = golden.generate(PROMPT, policy, gen_length=32, temperature=50.0, seed=0)
    assert 255 not in out.sequence


def test_stop(texts: runtime.Runtime) -> None:
    """Decoding ends with the step in which the string is complete; the text ends before it."""
    free = texts.generate("Hi", gen_length=32, tokens_per_step=1, window=1)
    assert len(free.text) > 12 and free.steps == 32
    stop = free.text[6:9]
    out = texts.generate("Hi", gen_length=32, tokens_per_step=1, window=1, stop=stop)
    assert out.text == free.text.split(stop)[0] and len(out.text) <= 6 and stop not in out.text
    assert out.steps < free.steps and out.ids == free.ids[: out.tokens] and 256 not in out.ids
    assert out.text == texts.text.decode(np.array(out.ids)), "the tokens end where the text does"
    assert out.sequence[-32:][: out.steps] == free.ids[: out.steps], "left to right here: a token a step"
    assert (out.ended, free.ended) == ("stop", "length")
    earlier = free.text[3:5]
    several = texts.generate("Hi", gen_length=32, tokens_per_step=1, window=1, stop=[stop, "never said", earlier])
    assert several.text == free.text[: free.text.index(earlier)] and several.steps < out.steps
    other = texts.generate("Hi", gen_length=32, tokens_per_step=1, window=1, stop="never said, this")
    assert other.text == free.text and other.steps == free.steps


def test_stop_and_eos(texts: runtime.Runtime) -> None:
    """A string beyond the EOS does not count, and an answer that was stopped holds no EOS."""
    free = texts.generate("Hi", gen_length=32, tokens_per_step=1, window=1)
    end = free.ids[4]
    head = free.text[: free.ids.index(end)]
    later = next(free.text[i : i + 3] for i in range(len(head) + 1, 29) if free.text[i : i + 3] not in head)
    options: dict[str, Any] = {"tokens_per_step": 1, "window": 1, "eos_id": end, "stop_at_eos": False}
    out = texts.generate("Hi", gen_length=32, stop=later, **options)
    assert out.sequence == free.sequence and out.ids == free.ids[: free.ids.index(end)] and out.steps == 32
    assert out.text == texts.text.decode(np.array(out.ids)) and later not in out.text


def test_what_is_settled() -> None:
    """The ids before the first mask or EOS: only they can be searched for a stop."""
    for answer, wanted in (
        ([5, 6, 99, 7, 99], [5, 6]), ([5, 98, 6, 99, 99], [5]), ([99, 5, 5, 5, 5], []), ([98, 5, 5, 5, 5], []),
        ([5, 6, 7, 8, 9], [5, 6, 7, 8, 9]),
    ):  # fmt: skip
        sequence = Sequence(np.array([99, 98, *answer]), 2, 99, (98,))  # the prompt does not count
        assert sequence.answer.tolist() == wanted


def test_messages(texts: runtime.Runtime) -> None:
    """A text is the single turn of a user."""
    said = texts.generate("Hi", gen_length=8)
    assert said.sequence == texts.generate([{"role": "user", "content": "Hi"}], gen_length=8).sequence
    assert said.sequence == texts.generate(texts.text.prompt("Hi"), gen_length=8).sequence
    assert said.text == texts.text.decode(np.array(said.ids))
    for empty in ("", " "):
        with refused(PromptError, "empty", "give some text"):
            texts.generate(empty, gen_length=8)


def test_unset_is_not_given(golden: runtime.Runtime) -> None:
    plain = golden.generate(PROMPT, gen_length=8)
    assert golden.generate(PROMPT, None, gen_length=8, window=UNSET, seed=UNSET, stop=UNSET).sequence == plain.sequence
    with refused(OptionError, "window must lie in 1 … 32", "got None"):
        golden.generate(PROMPT, gen_length=8, window=None)
