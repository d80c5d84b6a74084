"""On a real GPU: TensorRT makes the decisions of eager PyTorch. Skipped, with the reason, where there is none."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import export
import runtime
from engines.errors import BackendError
from engines.gpu.cuda import Cuda
from engines.runner import LayerwiseRunner
from engines.trt.package import CURRENT, find
from export.verify import verify
from runtime.evaluation.parity import verify as verify_tokens

pytestmark = pytest.mark.gpu
PROMPT = np.arange(1, 25)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint in fp16, compiled for this GPU."""
    try:
        cuda = Cuda()
    except BackendError as error:
        pytest.skip(str(error))
    capability = ".".join(map(str, cuda.capability))
    cuda.close()
    out = tmp_path_factory.mktemp("gpu") / "bundle"
    try:
        ahead = find().ahead_of_time
        return export.build(
            "demo", out, precision="fp16", backends=["tensorrt"], capabilities=[CURRENT] if ahead else None, max_batch=8
        )
    except BackendError as error:
        pytest.skip(f"TensorRT does not build for {capability}: {error}")


@pytest.fixture(scope="module")
def model(bundle: Path) -> Iterator[runtime.Runtime]:
    with runtime.load(bundle, "tensorrt") as loaded:
        yield loaded


def test_parts_and_plain_forward(bundle: Path) -> None:
    from engines.bundle import Bundle

    for row in verify(Bundle.open(bundle), "tensorrt", 5e-2):
        print(row)
        assert row.cosine > 0.999, row


def test_tokens_of_every_policy(bundle: Path) -> None:
    for line in verify_tokens(bundle, "tensorrt", 2):
        print(line)


def test_passes_that_run_ahead(model: runtime.Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured pass and stopping at the first drift give the same tokens, triggers and sigmas."""
    make, runs = model.model.new_runner, []
    for runs_ahead in (False, True):

        def new_runner(length: int, limit: int, runs_ahead: bool = runs_ahead) -> object:
            made = make(length, limit)
            assert isinstance(made, LayerwiseRunner)
            made.runs_ahead = runs_ahead
            return made

        monkeypatch.setattr(model.model, "new_runner", new_runner)
        runs.append(model.generate(PROMPT, gen_length=64, gamma=0.95))
    assert runs[0].sequence == runs[1].sequence
    assert [e.trigger for e in runs[0].trace] == [e.trigger for e in runs[1].trace]
    first, second = (np.concatenate([e.sigma for e in run.trace]) for run in runs)
    assert np.allclose(first, second, atol=1e-6)


def test_a_graph_is_captured(model: runtime.Runtime) -> None:
    model.generate(PROMPT, gen_length=64, gamma=0.0)
    (batch,) = model.model.batches.values()  # type: ignore[attr-defined]
    assert batch.runners[0].pass_queue.graphs["row", 0, True] is not None


def test_a_batch_decides_as_its_sequences_alone(model: runtime.Runtime) -> None:
    """Different lengths, with refreshes; only a decision so close that half precision may change it may differ."""
    ragged = [PROMPT[:count] for count in (24, 3, 17, 9, 1)]
    outs = model.generate_batch(ragged, gen_length=64, gamma=0.95)
    for prompt, ours in zip(ragged, outs, strict=True):
        alone = model.generate(prompt, gen_length=64, gamma=0.95)
        close = min(min(e.margin, *(abs(s - 0.95) for s in e.sigma), 1.0) for e in alone.trace)
        print(f"{len(prompt)} ids: equal {ours.sequence == alone.sequence}, closest decision {close:.1e}")
        assert ours.sequence == alone.sequence or close < 1e-2
    (batch,) = model.model.batches.values()  # type: ignore[attr-defined]
    assert batch.pass_queue.graphs["row", 5] is not None
