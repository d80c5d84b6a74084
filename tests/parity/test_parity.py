"""Parity: the back ends against golden data, the published loops, the oracle and each other.

How runs are compared is in `comparison` and `goldens`. The figures of every comparison are printed (`pytest -s`).
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import runtime
from engines.signatures.gpu import DRIFTS
from export.verify.difference import Difference
from runtime.decoding.generate import Output
from runtime.decoding.policies import SCOPES
from tests.support.comparison import (
    AMBIGUOUS,
    BACKENDS,
    NOISE,
    Comparison,
    Tally,
    compare,
    demo_prompts,
    difference,
    elastic_rows,
    layer_by_layer,
    random_model,
    random_models,
    recorded,
    sigma_gap,
)
from tests.support.goldens import (
    GOLDEN,
    confidence_gap,
    elastic_runs,
    golden_hidden,
    golden_logits,
    replay,
    trajectories,
    trajectory_difference,
)
from tests.support.oracle import Oracle, Run, Step

TOLERANCE = 5e-4  # of float32 logits and hidden states, which reach 19 in size
MODELS, PROMPTS = 5, 5  # the long checks of scripts/check.sh take 50 of each


@pytest.fixture(scope="module")
def eager(golden_bundle: Path) -> Iterator[runtime.Runtime]:
    with runtime.load(golden_bundle, "eager", threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def stepped(golden_bundle: Path) -> Iterator[runtime.Runtime]:
    with layer_by_layer(golden_bundle) as model:
        yield model


@pytest.fixture(params=(*BACKENDS, "layer by layer"))
def model(
    request: pytest.FixtureRequest, golden: runtime.Runtime, eager: runtime.Runtime, stepped: runtime.Runtime
) -> runtime.Runtime:
    """The golden bundle on each back end."""
    found = {"onnxruntime": golden, "eager": eager, "layer by layer": stepped}[request.param]
    assert isinstance(found, runtime.Runtime)
    return found


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle.read(GOLDEN)


@pytest.fixture(scope="module", params=range(5))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[runtime.Runtime]]:
    """A random model on both back ends; the first five have every kind of bias and head."""
    _, bundle = random_model(request.param, tmp_path_factory.mktemp("random"))
    with runtime.load(bundle, "onnxruntime", threads=1) as ours, runtime.load(bundle, "eager", threads=1) as theirs:
        yield [ours, theirs]


def close(backend: str, rows: Iterator[Difference]) -> None:
    for row in rows:
        print(f"{backend} {row.part}: max {row.max:.2e} mean {row.mean:.2e}")
        assert row.max < TOLERANCE, row


def test_golden_logits(model: runtime.Runtime) -> None:
    close(model.backend, golden_logits(model))


def test_golden_hidden_states(model: runtime.Runtime) -> None:
    close(model.backend, golden_hidden(model))


@pytest.mark.slow
def test_published_trajectories(model: runtime.Runtime) -> None:
    """Token for token, step by step, with as many rows in each forward as in the published loops."""
    worst, forwards, wasted = 0.0, 0, 0
    for golden in trajectories():
        out = replay(model, golden)
        assert trajectory_difference(out, golden) is None, golden["id"]
        worst = max(worst, confidence_gap(out, golden))
        forwards, wasted = forwards + out.steps, wasted + golden["nfe"] - out.steps
    print(f"{model.backend}: 80 trajectories, {forwards} forwards ({wasted} less), confidence max {worst:.2e}")
    assert len(trajectories()) == 80 and wasted > 0
    assert worst < NOISE


@pytest.mark.slow
def test_golden_elastic_runs(model: runtime.Runtime) -> None:
    worst = 0.0
    for number, (options, prompt, expected) in enumerate(elastic_runs()):
        out = model.generate(np.array(prompt), "elastic", **options)
        assert difference(recorded(out), expected) is None, f"run {number}: {options}"
        assert [event.rows for event in out.trace] == elastic_rows(expected, len(prompt), 4, **options), number
        worst = max(worst, sigma_gap(recorded(out), expected))
    print(f"{model.backend}: {len(elastic_runs())} runs, sigma max {worst:.2e}")
    assert len(elastic_runs()) == 202
    assert worst < NOISE


def passes(what: str, runs: Iterator[Comparison]) -> None:
    tally = Tally(list(runs))
    print(f"{what}: {tally.counts()}, smallest margins {tally.margins()}")
    assert not tally.diverged, [(run.name, run.diverged) for run in tally.diverged]
    assert tally.holds, [(run.name, run.margins) for run in tally.ambiguous]
    assert tally.counts()["steps"] > tally.counts()["refreshes"] > 0


@pytest.mark.slow
def test_random_models_three_ways() -> None:
    passes("random models", random_models(MODELS))


@pytest.mark.slow
def test_demo_prompts_three_ways() -> None:
    passes("demo prompts", demo_prompts(PROMPTS))


OPTIONS = st.fixed_dictionaries(
    {
        "gen_length": st.integers(1, 24), "window": st.integers(1, 32), "gamma": st.floats(0, 0.99),
        "drift": st.sampled_from(DRIFTS), "track_num": st.integers(1, 4), "block_caching": st.booleans(),
        "refresh_scope": st.sampled_from(SCOPES), "stop_at_eos": st.booleans(),
        "eos_id": st.sampled_from((250, 30, (12, 30, 7))),
    }
)  # fmt: skip
COMMITS = st.one_of(
    st.fixed_dictionaries({"threshold": st.floats(0.05, 1.0), "tokens_per_step": st.none()}),
    st.fixed_dictionaries({"threshold": st.none(), "tokens_per_step": st.integers(1, 4)}),
)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 249), min_size=1, max_size=40), OPTIONS, COMMITS)
def test_any_options_three_ways(
    golden: runtime.Runtime, eager: runtime.Runtime, oracle: Oracle, prompt: list[int], options: dict[str, Any],
    commits: dict[str, Any],
) -> None:  # fmt: skip
    chosen = options | commits
    if chosen["tokens_per_step"] is not None:
        chosen["tokens_per_step"] = min(chosen["tokens_per_step"], chosen["window"])
    found = compare("drawn", [golden, eager], oracle, prompt, **chosen)
    assume(not found.ambiguous)
    assert not found.diverged


# The baselines on random models. Their runs have no oracle; ambiguous ones follow from the events' margins.

BASELINES: dict[str, dict[str, Any]] = {
    "full": {"block_length": 8}, "full by threshold": {"threshold": 0.7, "block_length": 12},
    "prefix": {"threshold": 0.7, "block_length": 8}, "prefix by steps": {"steps": 16, "block_length": 8},
    "dual": {"threshold": 0.7, "block_length": 8}, "dual by steps": {"steps": 8, "block_length": 16},
    "interval": {"threshold": 0.7, "block_length": 8, "prompt_interval": 5, "response_interval": 2},
}  # fmt: skip


def block_rows(policy: str, out: Output, prompt_length: int, options: dict[str, Any]) -> Iterator[int]:
    """Rows that each step of a baseline has to run, from what the steps before it committed."""
    length, size = len(out.sequence), options["block_length"]
    masked = list(range(prompt_length, length))
    for event in out.trace:
        start = prompt_length + (masked[0] - prompt_length) // size * size
        block = range(start, min(start + size, length))
        new = all(p in masked for p in block)
        if policy == "interval":
            new = event.step % options["prompt_interval"] == 0
        short = {"full": length, "prefix": length - start, "dual": len(block), "interval": len(block)}[policy]
        if policy == "interval" and event.step % options["response_interval"] == 0:
            short = length - prompt_length
        yield length if new else short
        masked = [p for p in masked if p not in event.committed]


@pytest.mark.slow
def test_baselines_agree_and_run_the_rows_they_should(pair: list[runtime.Runtime]) -> None:
    config, rng = pair[0].bundle.config, random.Random(0)
    ambiguous, worst = 0, 0.0
    for name in [*BASELINES] * 3:
        policy, options = name.split()[0], BASELINES[name]
        prompt = [rng.randrange(config.vocab - 2) for _ in range(rng.randint(1, 40))]
        ours, theirs = (
            model.generate(np.array(prompt), policy, gen_length=32, stop_at_eos=False, **options) for model in pair
        )
        rows = list(block_rows(policy, ours, len(prompt), options))
        assert [event.active for event in ours.trace] == rows, name
        assert [event.rows for event in ours.trace] == [config.layers * count for count in rows], name
        if min(event.margin for event in theirs.trace) < NOISE:
            ambiguous += 1
            continue
        assert difference(recorded(ours), recorded(theirs)) is None, name
        for a, b in zip(ours.trace, theirs.trace, strict=True):
            assert a.tokens == b.tokens, name
            worst = max(worst, float(np.abs(np.subtract(a.confidences, b.confidences)).max()))
    runs = 3 * len(BASELINES)
    print(f"baselines: {runs} runs, {ambiguous} ambiguous, confidence max {worst:.2e}")
    assert ambiguous <= AMBIGUOUS * runs
    assert worst < NOISE


@pytest.mark.parametrize("commits", [{"threshold": 0.7}, {"steps": 16}])
def test_interval_of_one_is_full(pair: list[runtime.Runtime], commits: dict[str, Any]) -> None:
    prompt = np.arange(1, 20)
    options = {"gen_length": 32, "block_length": 8, **commits}
    for model in pair:
        full = recorded(model.generate(prompt, "full", **options))
        always = recorded(model.generate(prompt, "interval", prompt_interval=1, response_interval=1, **options))
        assert difference(always, full) is None


# The comparison itself: it must find differences.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output_ids": [1, 2, 9]}, "output_ids [1, 2, 9]"),
        ({"eos_at": 1}, "eos_at 1"),
        ({"steps": []}, "nfe 0"),
        ({"steps": [Step(3, [0.5], 1, [1, 2], [0])]}, "step 0: trigger 1"),
        ({"steps": [Step(3, [0.5], None, [1], [0])]}, "step 0: committed [1]"),
        ({"steps": [Step(3, [0.5], None, [1, 2], [1])]}, "step 0: tracked [1]"),
        ({"steps": [Step(2, [0.5], None, [1, 2], [0])]}, "step 0: active 2"),
    ],
)
def test_a_difference_is_named(change: dict[str, Any], words: str) -> None:
    run = Run([1, 2, 3], None, [Step(3, [0.5], None, [1, 2], [0])])
    assert difference(replace(run), run) is None
    assert (difference(replace(run, **change), run) or "").startswith(words)


def test_a_wrong_weight_is_found(golden_bundle: Path, oracle: Oracle) -> None:
    options, prompt, _ = elastic_runs()[0]
    with runtime.load(golden_bundle, "eager", threads=1) as damaged:
        model: Any = damaged.model
        model.weights["layer_02"]["v_proj.weight"] *= 1.05
        found = compare("damaged", [damaged], oracle, prompt, **options)
    assert found.wrong and list(found.diverged) == ["eager"]
    assert not Tally([found]).holds


def test_runs_with_small_margins_are_ambiguous() -> None:
    equal = Comparison("equal", 4, 1, {"gamma": 0.1}, {})
    ambiguous = Comparison("ambiguous", 4, 1, {"gamma": 0.1, "probe": NOISE / 2}, {"eager": "step 0: tracked [1]"})
    diverged = replace(ambiguous, margins={"gamma": 2 * NOISE})
    tally = Tally([equal, ambiguous, diverged])
    assert (tally.ambiguous, tally.diverged) == ([ambiguous], [diverged])
    assert tally.margins() == {"gamma": 2 * NOISE, "probe": NOISE / 2}
    assert not tally.holds and not Tally([]).holds
    assert Tally([equal] * 18 + [ambiguous] * 2).holds and not Tally([equal] * 17 + [ambiguous] * 3).holds
