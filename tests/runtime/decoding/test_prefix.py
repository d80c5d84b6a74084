"""Reused prefixes: what is kept never decides tokens, back ends agree, and states stay as they are."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import runtime
from engines.errors import BackendError, OptionError, PromptError
from runtime.decoding.prefix import PrefixCache
from runtime.shared import shared_ids
from tests.support.cases import refused
from tests.support.fake_gpu import FakeCuda, fake_gpu
from tests.support.gpu_models import build_golden
from tests.support.runs import decisions

PREFIXES = [list(range(3, 40)), [7] * 20, list(range(100, 131))]
OPTIONS: dict[str, Any] = {"gen_length": 24, "window": 8, "gamma": 0.9}
BACKENDS = "eager", "onnxruntime", "tensorrt"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, runtime.Runtime]]:
    """With a cache that holds everything."""
    with fake_gpu():
        root = build_golden(tmp_path_factory.mktemp("prefix") / "bundle")
        found = {name: runtime.load(root, name, prefix_cache=1 << 30) for name in BACKENDS}
        yield found
        for model in found.values():
            model.close()
        assert not FakeCuda.latest.owned, "states on the device are freed"


def request(number: int) -> tuple[list[int], dict[str, Any]]:
    """A prompt behind one of the prefixes, and its options."""
    rng = random.Random(number)
    prefix = rng.choice(PREFIXES)
    rest = [rng.randrange(200) for _ in range(rng.randint(1, 12))]
    return prefix + rest, OPTIONS | {"prefix": len(prefix), "gamma": rng.choice((0.0, 0.9, 0.98))}


def test_back_ends_agree(models: dict[str, runtime.Runtime]) -> None:
    """Tokens, triggers, tracked tokens and rows, the first time and with the state kept."""
    for number in range(12):
        prompt, options = request(number)
        outs = [model.generate(prompt, **options) for model in models.values() for _ in range(2)]
        assert all(out.prefix_rows == options["prefix"] for out in outs)
        assert all(decisions(out) == decisions(outs[0]) and out.sequence == outs[0].sequence for out in outs), number
        rest = len(outs[0].sequence) - options["prefix"]
        assert outs[0].trace[0].rows == rest * models["eager"].bundle.config.layers
    assert all(model.prefixes.misses == 3 for model in models.values())  # type: ignore[union-attr]


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.integers(0, 199), min_size=1, max_size=10), st.sampled_from((0, 60_000, 1 << 30)), st.integers(1, 3),
    st.sampled_from(BACKENDS),
)  # fmt: skip
def test_what_is_kept_decides_nothing(
    models: dict[str, runtime.Runtime], numbers: list[int], budget: int, size: int, backend: str
) -> None:  # fmt: skip
    """In any order, alone or in batches, with a budget for none, for one or for all."""
    model = models[backend]
    kept, expected = model.prefixes, {}
    for number in numbers:
        prompt, options = request(number)
        expected[number] = model.generate(prompt, **options).sequence
    model.prefixes = PrefixCache(budget)
    try:
        for start in range(0, len(numbers), size):
            by_gamma: dict[Any, list[int]] = {}
            for number in numbers[start : start + size]:
                options = request(number)[1]
                by_gamma.setdefault((options["gamma"], options["prefix"]), []).append(number)
            for (gamma, prefix), group in by_gamma.items():
                outs = model.generate_batch(
                    [request(number)[0] for number in group], **OPTIONS | {"gamma": gamma, "prefix": prefix}
                )  # fmt: skip
                assert [out.sequence for out in outs] == [expected[number] for number in group]
            assert model.prefixes.nbytes <= budget
    finally:
        model.prefixes.close()
        model.prefixes = kept


def test_refreshes_leave_the_state(models: dict[str, runtime.Runtime]) -> None:
    """A run in which everything is refreshed, then one without: as if the first had not been."""
    prompt, _ = request(1)
    for model in models.values():
        options = OPTIONS | {"prefix": 20}
        before = model.generate(prompt, **options | {"gamma": 0.0}).sequence
        assert any(event.refreshed for event in model.generate(prompt, **options | {"gamma": 1.0}).trace)
        assert model.generate(prompt, **options | {"gamma": 0.0}).sequence == before


def test_embeddings_are_part_of_a_prefix(models: dict[str, runtime.Runtime]) -> None:
    """Rows in place of ids, as images have: other rows with the same ids are another prefix."""
    config = models["eager"].bundle.config
    rng = np.random.default_rng(0)
    prompt = [3, 1, *range(config.vocab, config.vocab + 6), 4, 1, 5]
    for number in range(2):
        rows = rng.standard_normal((6, config.d_model)).astype(np.float32)
        outs = []
        for model in models.values():
            assert model.prefixes is not None
            before = model.prefixes.misses
            outs += [model.generate(prompt, **OPTIONS, prefix=9, embeddings=rows) for _ in range(2)]
            assert model.prefixes.misses == before + 1, number
        assert all(decisions(out) == decisions(outs[0]) for out in outs)


def test_what_is_refused(models: dict[str, runtime.Runtime]) -> None:
    model = models["onnxruntime"]
    with refused(OptionError, "only elastic tests a reused prefix", "full"):
        model.generate([1, 2, 3], "full", prefix=2, gen_length=4)
    for prefix in (3, 9, -1):
        with refused(PromptError, f"prefix {prefix} must leave at least one of 3"):
            model.generate([1, 2, 3], prefix=prefix, gen_length=4)
    with runtime.load(model.bundle.root, "eager") as other, refused(OptionError, "without a cache", "prefix_cache"):
        other.generate([1, 2, 3], prefix=2, gen_length=4)
    with refused(OptionError, "prefix_cache must be a number of bytes", "-1"):
        runtime.load(model.bundle.root, "onnxruntime", prefix_cache=-1)
    assert models["eager"].prefixes is not None and model.prefixes is not None
    state = model.prefixes.state(model.model, np.arange(4), None, 8)
    with refused(BackendError, "belongs to the model that made it"):
        models["eager"].model.new_runner(16).set_prefix_state(state, 0)


def test_the_boundary_is_a_function_of_the_messages(text_bundle: Path) -> None:
    """It lies behind the end of the turn before the last message, whatever that says."""
    with runtime.load(text_bundle, "onnxruntime", threads=1, prefix_cache=1 << 30) as model:
        earlier = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
        counts = set()
        for content in ("3 + 3?", "x", "<|endoftext|> y", "4"):
            turns = [*earlier, {"role": "user", "content": content}]
            counts.add(shared_ids(model.text, turns))
            out = model.generate(turns, gen_length=8)
            assert out.prefix_rows == shared_ids(model.text, turns) and out.to_json()["prefix_rows"] == out.prefix_rows
        assert len(counts) == 1 and counts.pop() > 4
        assert (
            shared_ids(model.text, "one message") == 0 and model.generate("one message", gen_length=8).prefix_rows == 0
        )
        assert model.prefixes is not None and (model.prefixes.hits, model.prefixes.misses) == (3, 1)
        assert model.generate(turns, "full", gen_length=8).prefix_rows == 0
