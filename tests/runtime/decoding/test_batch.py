"""Several sequences side by side: each is decoded as it is alone, whatever shares its batch."""

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import export
import runtime
from engines.errors import BackendError, OptionError, PromptError
from runtime.cli import main
from runtime.decoding.generate import Output
from runtime.decoding.policies import FULL_ATTENTION
from tests.support.cases import refused, sentence
from tests.support.comparison import BACKENDS, difference, recorded

prompts = st.lists(st.lists(st.integers(0, 249), min_size=1, max_size=40), min_size=1, max_size=6)
options = st.fixed_dictionaries(
    {
        "gen_length": st.integers(1, 32), "window": st.integers(1, 32), "threshold": st.floats(0.05, 1.0),
        "gamma": st.floats(0.5, 0.99), "track_num": st.integers(1, 4), "block_caching": st.booleans(),
        "refresh_scope": st.sampled_from(("all", "near")), "refresh_start": st.sampled_from(("next", "first")),
        "eos_id": st.sampled_from((250, 30, (12, 30, 7))),
        "max_masks": st.sampled_from((None, 64)), "window_span": st.sampled_from((None, 8)),
    }
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=200)
@given(prompts, options)
def test_ragged_batches(golden: runtime.Runtime, prompts: list[list[int]], options: dict[str, Any]) -> None:
    """200 of them: ids, ends, triggers, commits and tracked tokens of every sequence as it has them alone.

    None is set apart, however near its decisions: a batch computes here what its sequences do, bit for bit.
    """
    outs = golden.generate_batch(prompts, **options)
    for prompt, out in zip(prompts, outs, strict=True):
        alone = golden.generate(prompt, **options)
        assert difference(recorded(out), recorded(alone)) is None
        assert [event.tokens for event in out.trace] == [event.tokens for event in alone.trace]
        assert [event.rows for event in out.trace] == [event.rows for event in alone.trace]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("policy", FULL_ATTENTION)
def test_every_policy(golden_bundle: Path, backend: str, policy: str) -> None:
    rng = random.Random(4)
    ragged = [[rng.randrange(250) for _ in range(length)] for length in (3, 40, 17, 1, 25)]
    with runtime.load(golden_bundle, backend, threads=1) as model:
        outs = model.generate_batch(ragged, policy, gen_length=24, eos_id=30)
        alone = [model.generate(prompt, policy, gen_length=24, eos_id=30) for prompt in ragged]
    for ours, theirs in zip(outs, alone, strict=True):
        assert ours.sequence == theirs.sequence and ours.steps == theirs.steps and ours.eos_at == theirs.eos_at
    assert len({out.steps for out in outs}) > 1 or policy == "timesteps", "they end at different steps"


def test_draws_of_a_sequence_are_its_own(golden: runtime.Runtime) -> None:
    ragged = [[1, 2, 3], [7] * 20, [9, 8]]
    drawn: dict[str, Any] = {"gen_length": 16, "temperature": 1.0, "seed": 5}
    outs = golden.generate_batch(ragged, **drawn)
    assert [out.sequence for out in outs] == [golden.generate(prompt, **drawn).sequence for prompt in ragged]


def test_events_say_whose_they_are(golden: runtime.Runtime) -> None:
    """Steps of all come in turn, an output after the last of its own; what has ended does not come again."""
    ragged = [[1, 2, 3], [7] * 20, [9, 8]]
    seen: dict[int, list[Any]] = {0: [], 1: [], 2: []}
    for number, event in golden.stream_batch(ragged, gen_length=16):
        assert not seen[number] or not isinstance(seen[number][-1], Output)
        seen[number].append(event)
    for events in seen.values():
        *steps, out = events
        assert isinstance(out, Output) and out.trace == steps and [e.step for e in steps] == list(range(len(steps)))


def test_text(text_bundle: Path) -> None:
    with runtime.load(text_bundle, "onnxruntime", threads=1) as model:
        outs = model.generate_batch(["Hi", [{"role": "user", "content": "a longer one"}]], gen_length=8)
        assert [out.text for out in outs] == [model.generate(p, gen_length=8).text for p in ("Hi", "a longer one")]


def test_the_command(
    text_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line for each prompt of a file, in order; more than a batch holds come batch by batch."""
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(["Hi", "", *(f"number {n}" for n in range(17))]))
    given = ["generate", str(text_bundle), "--prompts", str(file), "--gen-length", "8", "--threads", "1"]
    assert main([*given, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == list(range(1, 19))
    with runtime.load(text_bundle, "onnxruntime", threads=1) as model:
        assert lines[17]["ids"] == model.generate("number 16", gen_length=8).ids
    assert main(given) == 0
    printed = capsys.readouterr()
    tokens = sum(line["tokens"] for line in lines)
    assert printed.out.startswith("[1] ") and f"18 prompts, {tokens} tokens in" in printed.out + printed.err
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    assert main(["-" if given[i - 1] == "--prompts" else word for i, word in enumerate(given)]) == 0
    assert "1 prompts" in capsys.readouterr().out
    file.write_text("\n")
    for extra, words in (([], ("no prompt", "one per line")), (["--trace", "t"], ("--trace", "one prompt"))):
        assert main([*given, *extra]) != 0
        sentence(capsys.readouterr().err, *words)


def test_what_is_refused(golden: runtime.Runtime, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with refused(OptionError, "a batch has 1 … 16 prompts", "not 17", "--max-batch 17"):
        golden.generate_batch([[1]] * 17, gen_length=4)
    with refused(OptionError, "prompts are a list"):
        golden.generate_batch("abc", gen_length=4)
    with refused(OptionError, "a batch has 1 … 16", "not 0"):
        golden.generate_batch([], gen_length=4)
    with refused(PromptError, "empty", "at least one id"):
        golden.generate_batch([[1], []], gen_length=4)
    bundle = export.build(tiny_checkpoint, tmp_path / "one", max_batch=1)
    with (
        runtime.load(bundle, "onnxruntime", threads=1) as model,
        refused(OptionError, "a batch has 1 … 1 prompts", "1 … 1"),
    ):
        model.generate_batch([[1], [2]], gen_length=4)


def test_the_model_is_taken_and_given_back(golden: runtime.Runtime) -> None:
    events = golden.stream_batch([[1], [2]], gen_length=8)
    next(events)
    with refused(BackendError, "in use"):
        golden.generate([1], gen_length=4)
    events.close()  # type: ignore[attr-defined]
    assert golden.generate(np.array([1]), gen_length=4).steps
