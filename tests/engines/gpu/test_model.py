"""The memory of a GPU model: one batch after the other, and batches that do not fit."""

from pathlib import Path

import pytest

import runtime
from engines.errors import BackendError
from tests.support.cases import refused
from tests.support.fake_gpu import fake_gpu, fake_provider
from tests.support.gpu_models import RAGGED, device, passes_of
from tests.support.runs import assert_same


@pytest.mark.slow
def test_memory_serves_one_batch_after_the_other(bundle: Path) -> None:
    """Memory grows with the largest batch, and the smaller one's is freed; smaller batches use the first batch rows."""
    with fake_gpu(), runtime.load(bundle, "tensorrt") as model:
        _, cuda = device(model)
        outs, held = [], []
        for count in (1, 4, 2, 4, 1):
            outs.append(model.generate_batch(RAGGED[:count], gen_length=12, gamma=0.9))
            held.append((len(cuda.owned), sum(region.size for region in cuda.regions.values())))
        assert held[1][1] > held[0][1] and held[1] == held[3] == held[4]
        for a, b in ((0, 4), (1, 3)):
            for ours, theirs in zip(outs[a], outs[b], strict=True):
                assert_same(ours, theirs)
    assert not cuda.owned and not cuda.regions


def test_a_batch_larger_than_the_memory(bundle: Path) -> None:
    """The error names what does not fit, the memory taken so far is freed, and one sequence still runs."""
    with fake_gpu(), runtime.load(bundle, "tensorrt") as model:
        _, cuda = device(model)
        held = list(cuda.owned)
        expected = model.generate(RAGGED[0], gen_length=8)
        cuda.limit = sum(region.size for region in cuda.regions.values()) + 200_000
        with refused(BackendError, "out of GPU memory", "of 6 sequences"):
            model.generate_batch(RAGGED, gen_length=8)
        assert set(held) <= set(cuda.owned) and not device(model)[0].batches
        assert_same(model.generate(RAGGED[0], gen_length=8), expected)


def test_memory_of_other_lengths_is_freed_first(golden_bundle: Path) -> None:
    """ONNX Runtime's sequences have memory by length: idle memory is freed before a batch is refused."""
    with fake_provider(), runtime.load(golden_bundle, "onnxruntime") as model:
        made, cuda = device(model)
        model.generate([1] * 300, gen_length=4)
        cuda.limit = sum(region.size for region in cuda.regions.values()) + 200_000
        assert len(made.batches) == 1 and model.generate_batch([[1], [2, 3]], gen_length=4)
        assert list(made.batches) == [256]


def test_more_sequences_than_the_engines_take(bundle: Path) -> None:
    """9 sequences lie in no profile of the engines."""
    with fake_gpu(), runtime.load(bundle, "tensorrt") as model, refused(BackendError, "refuses ids (9, ", "embed"):
        device(model)[0].reuse(passes_of(model, 9))
