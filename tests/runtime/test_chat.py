"""A conversation: its history, its figures, and the text shown while masks are filled."""

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import runtime
from engines.errors import BackendError, BundleError, OptionError, PromptError
from runtime.answer import MASK, frame
from runtime.chat import Chat, Note
from runtime.decoding.events import StepEvent
from runtime.decoding.generate import Output
from runtime.decoding.request import prompt_array
from tests.support.cases import refused, sentence
from tests.support.chat import SHORT, answer, stop_at

MASK_ID, EOS, BOS, USER, ASSISTANT = 256, 257, 258, 259, 260
LIMIT = 256  # the bundle's length


@pytest.fixture(scope="module")
def model(text_bundle: Path) -> Iterator[runtime.Runtime]:
    with runtime.load(text_bundle, "onnxruntime", threads=1) as loaded:
        yield loaded


@pytest.fixture
def prompts(model: runtime.Runtime, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids of every prompt that is decoded."""
    seen: list[list[int]] = []
    stream = model.stream

    def watched(prompt: Any, *args: Any, **options: Any) -> Any:
        seen.append(list(map(int, prompt)))
        return stream(prompt, *args, **options)

    monkeypatch.setattr(model, "stream", watched)
    return seen


def ids(model: runtime.Runtime, text: str) -> list[int]:
    return list(map(int, model.text.encode(text)))


# History


def test_history_is_kept_and_used(model: runtime.Runtime, prompts: list[list[int]]) -> None:
    chat = Chat(model, options=SHORT)
    first = answer(chat, "Hi")
    second = answer(chat, "And?")
    assert prompts[0] == [BOS, USER, *ids(model, "Hi"), EOS, ASSISTANT]
    assert prompts[1] == [*prompts[0], *ids(model, first.text), EOS, USER, *ids(model, "And?"), EOS, ASSISTANT]
    assert chat.turns == [("Hi", first.text), ("And?", second.text)] and first.text
    assert second.ids == model.generate(prompts[1], **SHORT).ids


def test_reset_forgets(model: runtime.Runtime, prompts: list[list[int]]) -> None:
    chat = Chat(model, options=SHORT)
    first = answer(chat, "Hi")
    answer(chat, "And?")
    chat.reset()
    assert chat.turns == [] and answer(chat, "Hi").ids == first.ids
    assert prompts[2] == prompts[0] and chat.figures.turns == 3, "the figures stay"


def test_the_system_message_comes_first(model: runtime.Runtime, prompts: list[list[int]]) -> None:
    chat = Chat(model, options=SHORT, system="Be kind.")
    for text in ("a", "b"):
        answer(chat, text)
    chat.reset()
    answer(chat, "c")
    start = [BOS, *ids(model, "<|system|>Be kind."), EOS, USER]
    assert len(prompts) == 3 and all(prompt[: len(start)] == start for prompt in prompts)


def test_options_reach_the_run(model: runtime.Runtime) -> None:
    options: dict[str, Any] = {"gen_length": 12, "window": 4, "threshold": 0.5, "temperature": 2.0, "seed": 5}
    out = answer(Chat(model, "elastic", options), "Hi")
    assert out.ids == model.generate("Hi", "elastic", **options).ids != model.generate("Hi", gen_length=12).ids


@pytest.mark.parametrize(
    ("options", "words"),
    [({"gen_length": 0}, ("gen_length", "1 … 256", "0")), ({"window": 17}, ("window", "1 … 16", "17")),
     ({"seed": 1}, ("seed", "temperature")), ({"steps": 4}, ("elastic does not use steps",)),
     ({"top_p": 7}, ("top_p", "(0, 1]", "7"))],
)  # fmt: skip
def test_options_are_refused_before_the_first_turn(
    model: runtime.Runtime, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    with refused(OptionError, *words):
        Chat(model, options=options)


def test_a_bundle_without_a_tokenizer(golden: runtime.Runtime) -> None:
    with refused(BundleError, "no tokenizer.json", "use generate"):
        Chat(golden)


def test_figures(model: runtime.Runtime) -> None:
    chat = Chat(model, options={"gen_length": 12})
    assert str(chat.figures) == "no answer yet"
    outs = [answer(chat, text) for text in ("Hi", "What is that?", "I see.")]
    found = chat.figures
    assert (found.turns, found.tokens, found.steps) == (3, sum(o.tokens for o in outs), sum(o.steps for o in outs))
    assert found.seconds == pytest.approx(sum(event.seconds for out in outs for event in out.trace)) and found.tokens
    layers = model.bundle.config.layers
    rows = sum(event.rows for out in outs for event in out.trace)
    possible = sum(out.steps * layers * len(out.sequence) for out in outs)
    words = re.fullmatch(
        r"3 turns, (\d+) tokens in (\d+) steps, [\d.]+ s, [\d.]+ tokens/s; "
        r"layer-rows computed: ([\d.]+%) of the last answer, ([\d.]+%) in all",
        str(found),
    )
    assert words and words.groups() == (
        str(found.tokens), str(found.steps), f"{outs[-1].computed_fraction:.1%}", f"{rows / possible:.1%}",
    )  # fmt: skip


# Answers that do not end


@pytest.mark.parametrize("shown", [0, 1, 3])
def test_a_closed_answer_leaves_no_trace(model: runtime.Runtime, shown: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream is closed at once, not when it is collected."""
    kept, stream = [], model.stream

    def keeping(*args: Any, **options: Any) -> Iterator[StepEvent | Output]:
        kept.append(stream(*args, **options))
        return kept[-1]

    monkeypatch.setattr(model, "stream", keeping)
    chat = Chat(model, "full", {"gen_length": 16})
    first = answer(chat, "Hi")
    before = (list(chat.turns), str(chat.figures))
    with closing(chat.say("And?")) as saying:
        for _ in range(shown):
            assert isinstance(next(saying), str)
        if shown:
            with refused(BackendError, "in use"):
                model.generate("Hi", gen_length=8)
    assert (chat.turns, str(chat.figures)) == before
    assert model.generate("Hi", "full", gen_length=16).ids == first.ids, "the model is free"


def test_ctrl_c_within_a_step(model: runtime.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = Chat(model, "full", {"gen_length": 16})
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with closing(chat.say("Hi")) as saying, pytest.raises(KeyboardInterrupt):
            for _ in saying:
                pass
    assert chat.turns == [] and chat.figures.turns == 0
    assert answer(chat, "Hi").steps == 16


# Conversations that grow too long


def test_the_oldest_turns_are_dropped(model: runtime.Runtime, prompts: list[list[int]]) -> None:
    options = {"gen_length": 16, "stop": "\ufffd"}  # answers are short, so that lengths are known
    chat = Chat(model, options=options, system="S")
    texts = [letter * 60 for letter in "abcde"]
    notes = []
    for text in texts:
        notes.append([item.text for item in chat.say(text) if isinstance(item, Note)])
    assert notes[0] == [] and notes[-1] and all(len(lines) <= 1 for lines in notes)
    for line in notes[-1]:
        sentence(line, "the oldest turn is left out", "gen_length 16", "length 256")
    kept = [user for user, _ in chat.turns]
    assert kept == texts[-len(kept) :] and 1 < len(kept) < 5
    system = [BOS, *ids(model, "<|system|>S"), EOS, USER]
    assert prompts[-1][: len(system) + 60] == [*system, *ids(model, kept[0])] and len(prompts[-1]) + 16 <= LIMIT


def test_a_message_too_long_by_itself(model: runtime.Runtime) -> None:
    chat = Chat(model, options=SHORT)
    answer(chat, "Hi")
    before = list(chat.turns)
    with refused(PromptError, "304 prompt ids", "gen_length 8", "length 256", "shorten"):
        answer(chat, "x" * 300)
    assert chat.turns == before
    answer(chat, "And?")
    assert len(chat.turns) == 2


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(0, 280), st.integers(0, 60), st.booleans()), max_size=8), st.booleans())
def test_what_is_remembered(model: runtime.Runtime, turns: list[tuple[int, int, bool]], spoken: bool) -> None:
    """The prompt is as many of the last turns as fit, the system first; only turns that ended are turns."""
    seen: list[list[int]] = []
    said = ""

    def stream(prompt: Any, policy: Any, gen_length: int, embeddings: Any) -> Iterator[StepEvent | Output]:
        prompt_array(prompt, model.model, gen_length)
        seen.append(list(map(int, prompt)))
        event = StepEvent(0, 1, [], None, None, [], [], [], [], [], 1, 1.0, 1.0)
        yield event
        yield Output([], said, 1, len(said), 1.0, 1.0, [], None, [event])

    def spelled(turns: list[tuple[str, str]], text: str) -> list[int]:
        system = "<|system|>system<|endoftext|>" if spoken else ""
        history = "".join(f"<|user|>{a}<|endoftext|><|assistant|>{b}<|endoftext|>" for a, b in turns)
        return ids(model, f"<|startoftext|>{system}{history}<|user|>{text}<|endoftext|><|assistant|>")

    remembered: list[tuple[str, str]] = []
    ended = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "stream", stream)
        chat = Chat(model, options={"gen_length": 20}, system="system" if spoken else None)
        for number, (asked, answered, stopped) in enumerate(turns):
            text, said = chr(97 + number) * asked, chr(65 + number) * answered
            kept = [remembered[k:] for k in range(len(remembered) + 1)]
            kept = [some for some in kept if asked and len(spelled(some, text)) + 20 <= LIMIT]
            if not kept:
                with pytest.raises(PromptError):
                    answer(chat, text)
                assert chat.turns == remembered
                continue
            with closing(chat.say(text)) as saying:
                shown = [next(saying)]
                if len(kept[0]) < len(remembered):
                    assert isinstance(shown.pop(), Note)
                    shown.append(next(saying))
                assert shown == [20 * MASK] and seen[-1] == spelled(kept[0], text)
                if not stopped:
                    assert isinstance(next(saying), Output)
                    remembered, ended = [*kept[0], (text, said)], ended + 1
            assert (chat.turns, chat.figures.turns) == (remembered, ended)


# What is shown


@pytest.mark.parametrize(
    ("policy", "options"),
    [("elastic", {}), ("elastic", {"window": 4, "max_masks": 8, "tokens_per_step": 1}), ("full", {"steps": 12}),
     ("full", {"remasking": "random", "block_length": 24, "temperature": 1.0, "seed": 3}), ("timesteps", {}),
     ("full", {"eos_id": -1, "block_length": 24}), ("full", {"eos_id": -1, "stop_at_eos": False})],
)  # fmt: skip
def test_frames_agree_with_the_events(model: runtime.Runtime, policy: str, options: dict[str, Any]) -> None:
    options = {"gen_length": 24, **options}
    if options.get("eos_id") == -1:  # a token of the answer, so that it ends early
        free = model.generate("Hi", policy, **options | {"eos_id": None})
        options["eos_id"] = free.ids[len(free.ids) // 2]
    eos = options.get("eos_id", EOS)
    *frames, out = Chat(model, policy, options).say("Hi")
    assert isinstance(out, Output)
    start = len(model.text.prompt("Hi"))
    known: dict[int, int] = {}
    assert len(frames) == out.steps > 1
    for shown, event in zip(frames, out.trace, strict=True):
        known |= dict(zip(event.committed, event.tokens, strict=True))
        end = min((p for p, token in known.items() if token == eos), default=start + 24)
        pieces: list[Any] = [[]]
        for position in range(start, end):
            if position in known:
                pieces[-1].append(known[position])
            else:
                pieces.append([])
        assert shown == MASK.join(model.text.decode(np.array(piece, np.int64)) for piece in pieces)
    assert frames[-1] == out.text and MASK not in out.text and MASK in str(frames[0])


WORDS = st.text(st.sampled_from("ab é日本🙂\n"), max_size=20)


@given(WORDS, st.data())
def test_characters_whose_bytes_are_not_all_there(model: runtime.Runtime, words: str, data: st.DataObject) -> None:
    """Whole characters are shown, a mask for each mask, and what is left of a broken one as U+FFFD."""
    hidden = [data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in (len(c.encode()) for c in words)]
    tokens = model.text.encode(words)
    shown = frame(
        np.where(np.array([gap for gaps in hidden for gap in gaps], bool), MASK_ID, tokens),
        MASK_ID,
        (EOS,),
        model.text.decode,
    )
    wanted = (MASK * sum(gaps) if any(gaps) else c for c, gaps in zip(words, hidden, strict=True))
    assert shown.replace("\ufffd", "") == "".join(wanted)
    assert ("\ufffd" in shown) == any(any(gaps) and not all(gaps) for gaps in hidden)


@given(st.lists(st.sampled_from([*range(0, 260, 7), MASK_ID, MASK_ID, EOS, 258, 263]), min_size=1, max_size=30))
def test_any_ids_can_be_shown(model: runtime.Runtime, tokens: list[int]) -> None:
    shown = frame(np.array(tokens), MASK_ID, (EOS,), model.text.decode)
    before = tokens[: tokens.index(EOS)] if EOS in tokens else tokens
    assert shown.count(MASK) == before.count(MASK_ID) and "<|" not in shown
    shown.encode()
