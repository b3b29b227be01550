"""A long curve with fewer points looks as it did."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgrpo.report.thinning import thinned

finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=1, max_size=400), st.integers(4, 60))
def test_ends_and_extremes_stay_in_order_and_in_number(values: list[float], most: int) -> None:
    array = np.array(values)
    kept = thinned(array, most)
    assert len(kept) <= most
    assert (np.diff(kept) > 0).all()
    assert {0, len(values) - 1} <= {*kept.tolist()}
    assert array[kept].min() == array.min()
    assert array[kept].max() == array.max()


def test_a_short_curve_keeps_every_point() -> None:
    assert thinned(np.array([3.0, 1.0, 2.0, 9.0]), 4).tolist() == [0, 1, 2, 3]


def test_each_stretch_keeps_its_own_extremes() -> None:
    """Two stretches of five: 0 to 4 with extremes at 1 and 3, and 5 to 9 with extremes at 6 and 8."""
    values = np.array([0.0, -5.0, 0.0, 5.0, 0.0, 0.0, 1.0, 0.0, -1.0, 0.0])
    assert thinned(values, 6).tolist() == [0, 1, 3, 6, 8, 9]


def test_too_few_points_are_refused() -> None:
    with pytest.raises(ValueError, match="needs 4 points"):
        thinned(np.zeros(9), 3)
