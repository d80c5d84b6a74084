"""Parity of a back end with eager PyTorch: each part on the same inputs, then the plain forward."""

from collections.abc import Iterator
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from engines import registry
from engines.bundle import Bundle
from engines.config import layer_name
from engines.model import Model
from engines.registry import REFERENCE
from engines.runner import DriftInputs, SequenceRunner
from engines.signatures.gpu import DRIFTS
from engines.vision import open_vision
from export.verify.difference import Difference

LENGTH = 48  # positions at most


def differences(bundle: Bundle, backend: str, seed: int = 0) -> Iterator[Difference]:
    """Load the bundle on `backend` and on the reference, and compare them on random ids."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, bundle.config.vocab, min(LENGTH, bundle.capacity.max_length))
    with closing(registry.load(bundle, backend)) as model, closing(registry.load(bundle, REFERENCE)) as reference:
        yield from language_differences(model, reference, ids)
        if model.config.vision is not None:
            yield from vision_differences(model, reference, rng)


def language_differences(model: Model, reference: Model, ids: NDArray[np.int64]) -> Iterator[Difference]:
    """Compare the parts of the language model and its plain forward on ids [P].

    A layer runs on the reference's input, so that an error of one part is not
    carried into the next.
    """
    length = len(ids)
    runners = model.new_runner(length), reference.new_runner(length)
    for runner in runners:
        runner.embed(ids)
    yield Difference.of("embed", *(runner.hidden(0, length) for runner in runners))
    for index in range(model.config.layers):
        for runner in runners:
            runner.layer(index, length)
        output, expected = (runner.hidden(index + 1, length) for runner in runners)
        yield Difference.of(layer_name(index), output, expected)
        runners[0].set_hidden(index + 1, expected)
    yield Difference.of("head", *(runner.logits(np.arange(length)) for runner in runners))
    if model.config.block_length is None:  # a model with block-causal attention is decoded without a drift test
        yield from test_differences(runners, ids)
    yield Difference.of("forward", model.logits(ids), reference.logits(ids))


def test_differences(runners: tuple[SequenceRunner, SequenceRunner], ids: NDArray[np.int64]) -> Iterator[Difference]:
    """Compare the drift tests and the probe on a pass of a few rows; ids [P] have just been run."""
    length = len(ids)
    rows = max(1, length // 4)
    tracked, window = np.arange(1), np.arange(1, rows) if rows > 1 else np.arange(1)
    for number, kind in enumerate(DRIFTS, 1):
        results = []
        for runner in runners:
            runner.embed(np.roll(ids, number)[:rows])
            inputs = DriftInputs(
                kind, tracked=tracked, window=window, probe_keys=np.arange(runner.slots) < length, logits_rows=window
            )
            results.append(runner.reuse(rows, inputs, gamma=0.0))
        yield Difference.of(f"drift_{kind}", *(np.array(result.sigma[:1]) for result in results))
    probes = (np.sort(np.asarray(result.probes[0])) for result in results)
    yield Difference.of("probe", *(slots[slots < length] for slots in probes))


def vision_differences(model: Model, reference: Model, rng: np.random.Generator) -> Iterator[Difference]:
    """Compare the vision parts on two random tiles, each on the reference's own input."""
    with closing(open_vision(model)) as ours, closing(open_vision(reference)) as theirs:
        size, channels = ours.config.image_size, ours.config.channels
        pixels = rng.uniform(-1, 1, (2, channels, size, size)).astype(np.float32)
        features = theirs.tower(pixels)
        yield Difference.of("tower", ours.tower(pixels), features)
        yield Difference.of("projector", ours.projector(features), theirs.projector(features))
        yield Difference.of("newline", ours.newline, theirs.newline)
