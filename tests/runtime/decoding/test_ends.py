"""Where an answer ends: several ends, stop strings, ids that are never drawn, and prompts with padding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import runtime
from engines.errors import OptionError, PromptError
from runtime.decoding.policies import FULL_ATTENTION
from runtime.decoding.sequence import Positions
from runtime.decoding.stops import before, complete, cut
from tests.support.cases import refused
from tests.support.comparison import BACKENDS

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
LEFT_TO_RIGHT: dict[str, Any] = {"gen_length": 32, "tokens_per_step": 1, "window": 1}
WORDS = ["<s>", "<eot>", "one", " two", " three", "\n\n", "x\n", "é"]


@pytest.fixture(scope="module")
def texts(text_bundle: Path) -> Any:
    with runtime.load(text_bundle, "onnxruntime", threads=1) as model:
        yield model


# Ends


@pytest.mark.parametrize("policy", FULL_ATTENTION)
def test_any_of_the_ends_ends(golden: runtime.Runtime, policy: str) -> None:
    """The answer is that of the whole run up to the first of them, and the output says why it ended."""
    free = golden.generate(PROMPT, policy, gen_length=16, stop_at_eos=False)
    ends = [free.ids[9], free.ids[5]]
    first = min(map(free.ids.index, ends))
    whole = golden.generate(PROMPT, policy, gen_length=16, stop_at_eos=False, eos_id=ends)
    assert (whole.ids, whole.ended, free.ended) == (free.ids[:first], "eos", "length")
    assert whole.sequence == free.sequence and whole.eos_at is None
    out = golden.generate(PROMPT, policy, gen_length=16, eos_id=tuple(ends))
    assert out.ended == "eos" and out.sequence[out.eos_at or 0] in ends and out.steps <= free.steps
    assert not {*ends, 255} & {*out.ids} and out.ids == out.sequence[8 : 8 + out.tokens]


def test_ends_that_are_declared(golden: runtime.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an option they are the model's, the end of a turn among them; `logits_eos_inf` hides EOS alone."""
    free = golden.generate(PROMPT, gen_length=16, stop_at_eos=False)
    turn, more = free.ids[9], free.ids[5]
    config = golden.model.config
    for name, value, token in (("eot_id", turn, turn), ("more_ends", (more,), more)):
        monkeypatch.setitem(vars(config), name, value)
        assert golden.generate(PROMPT, gen_length=16, stop_at_eos=False).ids == free.ids[: free.ids.index(token)]
        monkeypatch.undo()
    monkeypatch.setitem(vars(config), "eot_id", turn)
    monkeypatch.setitem(vars(config), "more_ends", (more,))
    hidden = golden.generate(PROMPT, "full", gen_length=16, stop_at_eos=False, logits_eos_inf=True).sequence[8:]
    assert not {250, more} & {*hidden}
    alone = golden.generate(PROMPT, gen_length=16, stop_at_eos=False, eos_id=250)
    assert alone.ids == free.ids, "an option takes the place of what is declared"


@pytest.mark.parametrize("value", [256, [1, 256], -1, [1.5], ["a"], [None], True])
def test_ends_that_are_refused(golden: runtime.Runtime, value: Any) -> None:
    with refused(OptionError, "eos_id", "0 … 255", "vocabulary"):
        golden.generate(PROMPT, gen_length=8, eos_id=value)


# Stop strings


def decode(ids: Positions, special: bool = False) -> str:
    return "".join(WORDS[i] for i in ids.tolist() if special or i > 1)


@pytest.mark.parametrize(
    ("ids", "stops", "kept", "text"),
    [([2, 3, 4], [" two"], [2], "one"), ([2, 3, 4], ["never"], [2, 3, 4], "one two three"),
     ([2, 1, 3], ["<eot>"], [2], "one"), ([0, 2, 1, 3], ["<eot>"], [0, 2], "one"),
     ([1, 2], ["<eot>"], [], ""), ([2, 3, 4], [" three", " two"], [2], "one"),
     ([2, 6, 4], ["\n"], [2, 6], "onex"), ([2, 5, 4], ["\n"], [2], "one"),
     ([2, 3, 4], ["e t"], [2], "on"), ([2, 0, 3], ["one two"], [], ""), ([7, 3], [" two"], [7], "é"),
     ([2, 1, 3], ["eot"], [2, 1], "one"), ([2, 3, 1, 4], [" two", "<eot>"], [2], "one")],
)  # fmt: skip
def test_ids_and_text_are_cut_alike(ids: list[int], stops: list[str], kept: list[int], text: str) -> None:
    """Special tokens count as their text; a token that the stop begins within stays among the ids."""
    assert complete(np.array(ids), decode, stops) == (kept != ids)
    found = cut(np.array(ids), decode, stops)
    assert (found[0].tolist(), found[1]) == (kept, text)


def test_before() -> None:
    assert before("a b c", [" c", " b"]) == "a" and before("abc", ["x"]) == before("abc", []) == "abc"


def test_a_special_token_as_a_stop(texts: runtime.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model says a token, which for this test is a special one: its text stops, though no answer shows it."""
    free = texts.generate("Hi", **LEFT_TO_RIGHT)
    token = free.ids[6]
    at = free.ids.index(token)
    plain = texts.text.decode

    def with_special(ids: Positions, special: bool = False) -> str:
        runs = np.split(ids, np.flatnonzero(ids == token)) if len(ids) else []
        shown = (("<|end|>" if special else "") + plain(run[1:]) if run[:1] == [token] else plain(run) for run in runs)
        return "".join(shown)

    monkeypatch.setattr(texts.text, "decode", with_special)
    out = texts.generate("Hi", **LEFT_TO_RIGHT, stop="<|end|>")
    assert (out.ids, out.tokens, out.ended, out.steps) == (free.ids[:at], at, "stop", at + 1)
    assert out.text == plain(np.array(free.ids[:at]))
    (batched,) = texts.generate_batch(["Hi"], **LEFT_TO_RIGHT, stop=("never said", "<|end|>"))
    assert batched.ids == out.ids and batched.ended == "stop"


@pytest.mark.parametrize("stop", ["", ["a", ""], 5, [5], [None]])
def test_stops_that_are_refused(texts: runtime.Runtime, stop: Any) -> None:
    with refused(OptionError, "stop"):
        texts.generate("Hi", gen_length=8, stop=stop)


# Ids that no token has


def test_ids_without_a_token_are_found(texts: runtime.Runtime, golden: runtime.Runtime) -> None:
    assert texts.unused == (261, 262, 263) and golden.unused == ()


def test_they_are_never_drawn(texts: runtime.Runtime) -> None:
    for policy in FULL_ATTENTION:
        drawn = texts.generate("Hi", policy, gen_length=64, temperature=50.0, seed=1).sequence[-64:]
        assert max(drawn) < 261, policy


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_most_probable_of_the_others_is_taken(text_bundle: Path, backend: str) -> None:
    """Also where the head's arg-max is such an id; it counts in the confidence all the same."""
    with runtime.load(text_bundle, backend, threads=1) as model:
        free = model.generate("Hi", "full", gen_length=4, steps=1, stop_at_eos=False)
        ids = np.array(free.sequence[:-4] + [256] * 4)
        logits = model.logits(ids)[0, -4:].astype(np.float64)
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        vars(model)["unused"] = (free.ids[0], 261, 262, 263)
        allowed = np.where(np.isin(np.arange(264), [256, *model.unused]), -np.inf, logits)
        out = model.generate("Hi", "full", gen_length=4, steps=1, stop_at_eos=False)
        assert out.sequence[-4:] == allowed.argmax(-1).tolist() and free.ids[0] not in out.sequence[-4:]
        wanted = (odds / odds.sum(-1, keepdims=True))[np.arange(4), out.sequence[-4:]]
        assert np.abs(np.array(out.trace[0].confidences) - wanted).max() < 1e-5
        elastic = model.generate("Hi", gen_length=32, stop_at_eos=False)
        assert not {*model.unused} & {*elastic.sequence[-32:]}


# Padding


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_prompt(golden: runtime.Runtime, side: str) -> None:
    """With its attention mask it is the prompt without the padding; without one it is refused."""
    wanted = golden.generate(PROMPT, gen_length=8).sequence
    padding = [250] * 3  # the golden checkpoint pads with its EOS
    ids, mask = (padding + PROMPT, [0] * 3 + [1] * 8) if side == "left" else (PROMPT + padding, [1] * 8 + [0] * 3)
    assert golden.generate(ids, gen_length=8, attention_mask=mask).sequence == wanted
    assert golden.generate(PROMPT, gen_length=8, attention_mask=np.ones(8)).sequence == wanted
    with refused(PromptError, "begin or end with the padding id 250", "attention_mask"):
        golden.generate(ids, gen_length=8)
    rows: Any = np.array([ids, [*range(1, 12)]])
    outs = golden.generate_batch(rows, gen_length=8, attention_mask=np.array([mask, [1] * 11]))
    assert outs[0].sequence == wanted and len(outs[1].sequence) == 19
    with refused(PromptError, "padding id 250"):
        golden.generate_batch(rows, gen_length=8)


def test_one_id_that_is_an_end_too(golden: runtime.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text may begin and end with EOS; a padding id of its own is never part of one."""
    assert golden.generate([250, *PROMPT, 250], gen_length=4).tokens
    monkeypatch.setitem(vars(golden.bundle.config), "pad_id", 200)
    assert golden.generate([250, 250, *PROMPT], gen_length=4).tokens
    for ids in ([200, *PROMPT], [*PROMPT, 200]):
        with refused(PromptError, "padding id 200"):
            golden.generate(ids, gen_length=4)


@pytest.mark.parametrize(
    ("mask", "words"),
    [([1] * 7, ("shape [7]", "[8]")), ([1, 0, 1, 1, 1, 1, 1, 1], ("1 for the prompt's ids",)),
     ([2] * 8, ("1 for the prompt's ids",)), ([0] * 8, ("empty",)), (1, ("shape []",))],
)  # fmt: skip
def test_masks_that_are_refused(golden: runtime.Runtime, mask: Any, words: tuple[str, ...]) -> None:
    with refused(PromptError, *words):
        golden.generate(PROMPT, gen_length=4, attention_mask=mask)


def test_a_mask_of_a_text(texts: runtime.Runtime) -> None:
    with refused(PromptError, "attention_mask", "text"):
        texts.generate("Hi", gen_length=4, attention_mask=[1])
    with refused(PromptError, "1 rows for 2 prompts"):
        texts.generate_batch([[1], [2]], gen_length=4, attention_mask=[[1]])
