"""The text of an answer as it settles: its pieces are the text, and none is taken back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import runtime
from runtime.answer import MASK, Answer, pieces
from runtime.decoding.events import StepEvent
from runtime.decoding.generate import Output
from runtime.decoding.request import Request

MASK_ID, EOS = 256, 257


@pytest.fixture(scope="module")
def model(text_bundle: Path) -> Iterator[runtime.Runtime]:
    with runtime.load(text_bundle, "onnxruntime", threads=1) as loaded:
        yield loaded


def event(committed: list[int], tokens: list[int]) -> StepEvent:
    return StepEvent(0, 1, [], None, None, [], committed, tokens, [], [], 1, 1.0, 1.0)


def output(text: str) -> Output:
    """An Output of which only the text matters."""
    values: dict[str, Any] = dict.fromkeys(Output.__dataclass_fields__)
    return Output(**values | {"text": text})


@given(
    st.text(st.sampled_from("ab é日🙂\ufffd"), min_size=1, max_size=12), st.randoms(), st.integers(0, 3), st.booleans()
)
def test_pieces(model: runtime.Runtime, words: str, rng: Any, group: int, stops: bool) -> None:
    """In whatever order masks are filled: no piece is taken back, and nothing is held that has settled."""
    ids = [*map(int, model.text.encode(words)), EOS, EOS]
    stop = "ab" if stops else None
    text = words.partition("ab")[0] if stops else words
    order = list(range(len(ids)))
    rng.shuffle(order)
    steps = [order[n : n + group + 1] for n in range(0, len(order), group + 1)]
    events = [event([7 + n for n in step], [ids[n] for n in step]) for step in steps]
    answer = Answer(model, 7, Request((), gen_length=len(ids), stop=(stop,) if stop else None))
    *found, out = pieces([*events, output(text)], answer)
    assert "".join(map(str, found)) == text and isinstance(out, Output)
    assert "" not in found


def test_what_is_held_back(model: runtime.Runtime) -> None:
    answer = Answer(model, 3, Request((), gen_length=12, stop=("stop",)))
    seen = []
    for position, token in enumerate(model.text.encode("añ stow")):
        answer.add(event([3 + position], [int(token)]))
        seen.append(answer.settled)
    assert seen == ["a", "a", "añ", "añ ", "añ ", "añ ", "añ ", "añ stow"]


def test_a_decoder_that_changes_its_mind(model: runtime.Runtime) -> None:
    """The whole text follows on a line of its own."""
    answer = Answer(model, 0, Request((), gen_length=4))
    tokens = [int(token) for token in model.text.encode("abcd")]
    found = list(pieces([event([0, 1], tokens[:2]), output("Xbcd")], answer))
    assert found[:-1] == ["ab", "\nXbcd"]


def test_frames_end_before_a_stop_string(model: runtime.Runtime) -> None:
    answer = Answer(model, 0, Request((), gen_length=6, stop=("bc",)))
    assert answer.frame == 6 * MASK
    answer.ids[:4] = np.array(model.text.encode("abcd"))
    assert answer.frame == answer.settled == "a"


@pytest.mark.parametrize("policy", ["elastic", "full", "timesteps"])
def test_a_run(model: runtime.Runtime, policy: str) -> None:
    out = model.generate("Hi", policy, gen_length=24)
    start = len(out.sequence) - 24
    *found, last = pieces([*out.trace, out], Answer(model, start, Request((), gen_length=24)))
    assert "".join(map(str, found)) == out.text and last is out and len(found) > 1


def test_a_special_token_that_stops(model: runtime.Runtime) -> None:
    """What follows it in the same step is not shown: the pieces are the text of the output."""
    (token,) = map(int, model.text.encode("<|user|>"))
    answer = Answer(model, 0, Request((), gen_length=4, stop=("<|user|>",)))
    a, b, c = map(int, model.text.encode("abc"))
    found = list(pieces([event([0, 1, 2, 3], [a, b, token, c]), output("ab")], answer))
    assert found[:-1] == ["ab"]
