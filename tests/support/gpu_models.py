"""Models on the fake GPU: how to load them, and what their batches and caches hold."""

from pathlib import Path
from typing import Any

import numpy as np

import export
import runtime
from engines.gpu.batch import Batch
from engines.gpu.model import GpuModel
from engines.runner import DriftInputs, ReusePass
from runtime.decoding.events import StepEvent
from runtime.decoding.generate import stream_batch
from runtime.decoding.policies import make_policy
from runtime.decoding.request import Request
from tests.support.cases import GOLDEN
from tests.support.fake_gpu import FakeCuda, fake_gpu

# Prompts of different lengths, and the shape of bundles that decode them side by side.
RAGGED: list[list[int]] = [[3, 1, 4], [7] * 20, [9, 8], list(range(30)), [5], [2, 71, 8, 2, 8]]
SHAPE: dict[str, Any] = {"window": 8, "track_num": 2, "max_length": 96, "max_batch": 8}


def build_golden(out: Path) -> Path:
    """The golden checkpoint in fp32 for every back end, TensorRT's engines compiled by the fake."""
    with fake_gpu():
        return export.build(GOLDEN, out, backends=["all"], window=32, track_num=2)


def device(model: runtime.Runtime) -> tuple[GpuModel, FakeCuda]:
    """A loaded model and its fake GPU."""
    assert isinstance(model.model, GpuModel) and isinstance(model.model.cuda, FakeCuda)
    return model.model, model.model.cuda


def batch_of(model: runtime.Runtime) -> Batch:
    """The only batch whose memory a model holds."""
    (batch,) = device(model)[0].batches.values()
    return batch


def caches(model: runtime.Runtime, batch_row: int) -> list[Any]:
    """H, Q, K and V [L, planes, positions, width] of a sequence, its positions in order, without dummies."""
    batch, (_, cuda) = batch_of(model), device(model)
    runner, c = batch.runners[batch_row], batch.caches
    real = np.flatnonzero(runner.control["key_mask"])
    order = real[np.argsort(runner.control["positions"][real])]
    found = []
    for n in "hqkv":
        layers = [cuda.at(c.at(n, index, batch_row), c.size(n)).view(np.float32) for index in range(c.layers[n])]
        found.append(np.stack([x.reshape(c.planes[n], c.slots, -1)[:, order] for x in layers]))
    return found


def poison(model: runtime.Runtime, batch_row: int) -> None:
    """Fill the caches of a batch row with NaN."""
    caches, (_, cuda) = batch_of(model).caches, device(model)
    for n in "hqkv":
        for index in range(caches.layers[n]):
            cuda.at(caches.at(n, index, batch_row), caches.size(n)).view(np.float32)[:] = np.nan


def step_counts(model: runtime.Runtime, requests: list[Request], **policy: Any) -> Any:
    """Waits, launches, uploads, downloads and engine runs of each step of a batch."""
    _, cuda = device(model)
    seen, last = [], -1
    for _, event in stream_batch(model.model, requests, make_policy("elastic", policy), None):
        if isinstance(event, StepEvent) and event.step > last:
            last = event.step
            seen.append([cuda.waits, *(cuda.counts[kind] for kind in ("launch", "upload", "download", "run"))])
    return np.diff(np.array(seen), axis=0)


def passes_of(model: runtime.Runtime, count: int) -> list[ReusePass]:
    """Reuse passes that are due in `count` sequences side by side, after a full pass of each."""
    made, _ = device(model)
    due = []
    for number, runner in enumerate(made.new_runners([(40, 40)] * count)):
        window = np.arange(4, 12)
        inputs = DriftInputs(
            kind="row", tracked=np.arange(2), window=window, probe_keys=np.arange(runner.slots) < 40,
            logits_rows=window,
        )  # fmt: skip
        runner.embed(np.arange(runner.slots) % 200 + number)
        runner.run_layers(runner.slots, inputs)
        runner.embed(np.arange(runner.padded_rows) % 200 + number + 1)
        due.append(ReusePass(runner, runner.padded_rows, inputs, 0.9))
    return due
