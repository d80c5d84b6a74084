"""Staging buffers: one upload for all arrays, and only after an edit."""

import numpy as np

from engines.gpu.staging import CONTROL, ControlBuffer, ResultBuffer, StagingBuffer
from engines.runner import DriftInputs
from tests.support.fake_gpu import FakeCuda

SLOTS = 10


def control() -> tuple[FakeCuda, ControlBuffer]:
    """The control arrays of one sequence, uploaded once."""
    cuda = FakeCuda()
    buffer = ControlBuffer(cuda, 1, dict.fromkeys(CONTROL, SLOTS), "fp32")
    buffer.upload()
    cuda.sync()
    return cuda, buffer


def drift_inputs(tracked: list[int], window: list[int]) -> DriftInputs:
    return DriftInputs(
        kind="row", tracked=np.array(tracked), window=np.array(window), probe_keys=np.arange(SLOTS) < 7,
        logits_rows=np.array(window),
    )  # fmt: skip


def test_arrays_are_copied_there_and_back() -> None:
    cuda = FakeCuda()
    buffer = StagingBuffer(cuda, a=((3,), np.int64), b=((2, 2), np.float32))
    buffer["a"][:], buffer["b"][:] = [1, 2, 3], 0.5
    buffer.upload()
    buffer.upload()
    assert cuda.counts["upload"] == 1
    cuda.sync()
    assert cuda.at(buffer.address["a"], 24).view(np.int64).tolist() == [1, 2, 3]
    cuda.at(buffer.address["b"], 16).view(np.float32)[:] = [1, 2, 3, 4]
    buffer.fetch()
    assert buffer["b"].tolist() == [[1, 2], [3, 4]]


def test_an_edit_waits_for_a_queued_upload() -> None:
    cuda, buffer = control()
    buffer.edit()
    buffer["ids"][:] = 1
    waits = cuda.waits
    buffer.upload()
    buffer.edit()
    assert cuda.waits == waits + 1
    buffer.edit()
    assert cuda.waits == waits + 1
    buffer["ids"][:] = 2
    assert (cuda.at(buffer.address["ids"], 8 * SLOTS).view(np.int64) == 1).all()


def test_drift_inputs_are_uploaded_when_they_change() -> None:
    cuda, buffer = control()
    for tracked, window, uploads in (([1], [4, 5], 2), ([1], [4, 5], 2), ([2], [4], 3)):
        buffer.set_drift_inputs(drift_inputs(tracked, window))
        buffer.upload()
        assert cuda.counts["upload"] == uploads
    assert np.flatnonzero(buffer["tracked"]).tolist() == [2] and np.flatnonzero(buffer["window"]).tolist() == [4]
    assert buffer["probe_keys"].sum() == 7


def test_rows_of_the_head_are_padded() -> None:
    _, buffer = control()
    buffer.set_head_rows(np.array([7, 8, 9]))
    buffer.set_head_rows(np.array([3]))
    assert buffer["rows"].tolist() == [3] + [0] * (SLOTS - 1)


def test_results_of_a_batch() -> None:
    result = ResultBuffer(FakeCuda(), batch=2, layers=3, track_num=4, rows=5)
    assert {name: array.shape for name, array in result.arrays.items()} == {
        "sigma": (3, 64), "probe": (3, 32), "token": (10,), "confidence": (10,),
    }  # fmt: skip
