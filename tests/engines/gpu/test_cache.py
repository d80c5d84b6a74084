"""The caches of several sequences: permutations and moves touch every layer of one sequence, and nothing else."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engines.bundle import Bundle
from engines.gpu.cache import NAMES, DeviceCaches
from tests.support.fake_gpu import FakeCuda

SLOTS = 6


@pytest.fixture(scope="module", params=[1, 3])
def caches(request: pytest.FixtureRequest, dream: Any) -> DeviceCaches:
    """Caches with fewer key heads than heads, filled with numbers that all differ."""
    bundle = Bundle.open(dream)
    assert bundle.config.kv_heads > 1
    return DeviceCaches(FakeCuda(), bundle.config, bundle.capacity, 4, SLOTS, request.param)


def fill(caches: DeviceCaches) -> dict[str, NDArray[np.int32]]:
    """Write distinct numbers; returns views [layers, batch, planes, slots, width] of the caches' memory."""
    views = {}
    for name in NAMES:
        raw = caches.cuda.at(caches.base[name], caches.layers[name] * caches.batch * caches.size(name))  # type: ignore[attr-defined]
        shape = caches.layers[name], caches.batch, caches.planes[name], SLOTS, -1
        views[name] = raw.view(np.int32).reshape(shape)
        views[name][...] = np.arange(views[name].size).reshape(views[name].shape)
    return views


@given(st.permutations(range(SLOTS)))
def test_a_permutation_of_slots(caches: DeviceCaches, source: list[int]) -> None:
    views = fill(caches)
    expected = {name: view.copy() for name, view in views.items()}
    row = caches.batch - 1
    for view in expected.values():
        view[:, row] = view[:, row][:, :, source]
    caches.permute(row, np.arange(SLOTS), np.array(source))
    caches.cuda.sync()
    for name in NAMES:
        assert np.array_equal(views[name], expected[name]), name


def test_neighbours_move_at_once(dream: Any) -> None:
    """Rows that swap places with neighbours: two copies out and two back for each cache, however many they are."""
    bundle = Bundle.open(dream)
    caches = DeviceCaches(FakeCuda(), bundle.config, bundle.capacity, 4, 40, 1)
    seen: list[int] = []
    caches.cuda.copy_rows = lambda *args: seen.append(args[-1])  # type: ignore[method-assign]
    front, back = np.arange(2, 12), np.arange(20, 30)
    caches.permute(0, np.concatenate([front, back]), np.concatenate([back, front]))
    assert len(seen) == 4 * len(NAMES)
    seen.clear()
    caches.permute(0, np.array([1, 30]), np.array([30, 1]))
    assert len(seen) == 4 * len(NAMES)


def test_a_move_to_another_batch_row(caches: DeviceCaches) -> None:
    views = fill(caches)
    expected = {name: view.copy() for name, view in views.items()}
    for view in expected.values():
        view[:, 0] = view[:, -1]
    caches.relocate(0, caches.batch - 1)
    caches.cuda.sync()
    for name in NAMES:
        assert np.array_equal(views[name], expected[name]), name


def test_addresses_of_layers(caches: DeviceCaches) -> None:
    """Layers follow each other, and within a layer the batch rows."""
    views = fill(caches)
    for name in NAMES:
        for index, row in ((0, 0), (1, caches.batch - 1)):
            raw = caches.cuda.at(caches.at(name, index, row), caches.size(name))  # type: ignore[attr-defined]
            assert np.array_equal(raw.view(np.int32), views[name][index, row].ravel()), (name, index, row)
