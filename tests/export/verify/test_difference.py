"""What counts as a difference."""

import math

import numpy as np
import pytest

from export.verify.difference import Difference


def test_a_difference() -> None:
    reference = np.array([3.0, -4.0, 0.0])
    row = Difference.of("part", reference + np.array([0.0, 0.1, 0.0]), reference)
    assert (row.max, row.mean, row.scale) == pytest.approx((0.1, 0.1 / 3, 4.0))
    assert row.within(0.026) and not row.within(0.024)
    assert Difference.of("part", reference / 10, reference / 10).scale == 1.0


def test_numbers_that_are_not_numbers_are_beyond_any_tolerance() -> None:
    assert not Difference.of("part", np.array([math.nan]), np.array([0.0])).within(math.inf)


def test_whole_numbers_differ_or_not() -> None:
    """The distance between two tokens means nothing, and neither does their size."""
    row = Difference.of("token", np.array([[7, 70_000]]), np.array([[7, 70_001]]))
    assert (row.max, row.mean, row.cosine, row.scale) == (1.0, 0.5, 0.5, 1.0) and not row.within(0.5)
    assert Difference.of("token", np.array([7]), np.array([7])).within(1e-9)
