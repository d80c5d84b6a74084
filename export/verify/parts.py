"""Parity of a back end with eager PyTorch: each part on the same inputs, then the plain forward."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines import registry as backends
from engines.bundle import Bundle
from engines.config import layer_name
from engines.errors import OptionError, ParityError
from engines.model import Model
from engines.registry import REFERENCE
from engines.runner import DriftInputs
from engines.signatures.gpu import DRIFTS
from engines.vision import open_vision

# Of engines, by the bundle's precision or by what their weights are quantised to.
TOLERANCES = {"fp32": 5e-4, "fp16": 5e-4, "bf16": 5e-4, "int8": 5e-2, "int4": 0.5}


@dataclass(frozen=True)
class Difference:
    """How far a part's output lies from the reference's.

    `scale` is the reference's largest magnitude, or 1 if that is larger: rounding
    errors of a hidden state grow with its largest number, so that tolerances do.
    """

    part: str
    max: float
    mean: float
    cosine: float
    scale: float = 1.0

    @classmethod
    def of(cls, part: str, value: NDArray[np.floating], reference: NDArray[np.floating]) -> "Difference":
        a, b = value.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
        gap = np.abs(a - b)
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        scale = max(1.0, float(np.abs(b).max()))
        return cls(part, float(gap.max()), float(gap.mean()), float(a @ b / norms) if norms else 1.0, scale)


def verify(bundle: Bundle, backend: str, atol: float, seed: int = 0) -> Iterator[Difference]:
    """Yield each part's difference; raises ParityError after the last if one exceeded `atol` times its scale.

    Parts get the reference's own inputs, so that one part's error is not
    carried into the next.
    """
    if not atol > 0:
        raise OptionError(f"atol must be positive, got {atol}")
    if backend == REFERENCE:
        raise OptionError(f"{REFERENCE} is the reference itself; verify another back end")
    rng = np.random.default_rng(seed)
    length = min(48, bundle.capacity.max_length)
    ids = rng.integers(0, bundle.config.vocab, length)
    model, reference = backends.load(bundle, backend), backends.load(bundle, REFERENCE)
    beyond = []
    for row in differences(model, reference, ids):
        if not row.max <= atol * row.scale:  # also when it is not a number
            beyond.append(row)
        yield row
    if beyond:
        worst = max(beyond, key=lambda row: row.max / row.scale)
        raise ParityError(
            f"{len(beyond)} parts of {bundle.root} differ from {REFERENCE} by more than {atol:g} on {backend}, the "
            f"worst is {worst.part} by {worst.max:.3g} where numbers reach {worst.scale:.3g}; build it again, or "
            "report it with what `inspect --json` prints"
        )


def differences(model: Model, reference: Model, ids: NDArray[np.int64]) -> Iterator[Difference]:
    length, layers = len(ids), model.config.layers
    runners = model.new_runner(length), reference.new_runner(length)
    for runner in runners:
        runner.embed(ids)
    yield Difference.of("embed", *(runner.hidden(0, length) for runner in runners))
    rows = max(1, length // 4)
    tracked, window = np.arange(1), np.arange(1, rows) if rows > 1 else np.arange(1)
    eligible = [np.arange(runner.slots) < length for runner in runners]
    for index in range(layers):
        for runner in runners:
            runner.layer(index, length)
        output, expected = (runner.hidden(index + 1, length) for runner in runners)
        yield Difference.of(layer_name(index), output, expected)
        runners[0].set_hidden(index + 1, expected)
    yield Difference.of("head", *(runner.logits(np.arange(length)) for runner in runners))
    for number, kind in enumerate(DRIFTS, 1):
        passes = []
        for runner, keys in zip(runners, eligible, strict=True):
            runner.embed(np.roll(ids, number)[:rows])
            passes.append(runner.reuse(rows, DriftInputs(kind, tracked, window, keys, window), gamma=0.0))
        yield Difference.of(f"drift_{kind}", *(np.array(outcome.sigma[:1]) for outcome in passes))
    found = [set(outcome.probes[0].tolist()) for outcome in passes]
    yield Difference("probe", float(found[0] != found[1]), float(found[0] != found[1]), 1.0)
    yield Difference.of("forward", model.logits(ids), reference.logits(ids))
    if model.config.vision is not None:
        yield from vision_differences(model, reference)


def vision_differences(model: Model, reference: Model) -> Iterator[Difference]:
    """The vision parts on two random tiles, each on the reference's own input."""
    ours, theirs = open_vision(model), open_vision(reference)
    side, channels = ours.config.image_size, ours.config.channels
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, channels, side, side)).astype(np.float32)
    features = theirs.tower(pixels)
    yield Difference.of("tower", ours.tower(pixels), features)
    yield Difference.of("projector", ours.projector(features), theirs.projector(features))
    yield Difference.of("newline", ours.newline, theirs.newline)
    ours.close()
    theirs.close()
