"""Window plans cover every frame, and the blend is a partition of unity of the paper's shape."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mi_jax.errors import InputError
from mi_jax.sample.windows import blend_weights, grid_length, plan_windows

lengths, windows, overlaps = st.integers(1, 200), st.integers(4, 40), st.integers(3, 39)


@settings(max_examples=300, deadline=None)
@given(lengths, windows, overlaps)
def test_plan_covers_every_frame_with_the_asked_overlap(length, window, overlap):
    assume(overlap < window)
    starts = plan_windows(length, window, overlap)
    size = min(window, length)
    covered = np.zeros(length, int)
    for start in starts:
        covered[start : start + size] += 1  # raises nothing past the end, so check it
        assert start + size <= length
    assert covered.min() >= 1
    assert starts[0] == 0
    assert starts[-1] == length - size
    assert (starts[:-1] + size - starts[1:] >= overlap).all()
    assert np.ptp(np.diff(starts)) <= 1 if len(starts) > 1 else True
    assert len(starts) == max(1, -(-(length - overlap) // (window - overlap)))  # no plan has fewer


@settings(max_examples=300, deadline=None)
@given(lengths, windows, overlaps)
def test_windows_of_a_grid_length_share_what_was_asked(length, window, overlap):
    assume(overlap < window)
    grid = grid_length(length, window, overlap)
    assert 0 <= grid - length < window - overlap
    assert len(plan_windows(grid, window, overlap)) == len(plan_windows(length, window, overlap))
    assert (np.diff(plan_windows(grid, window, overlap)) == window - overlap).all()


@settings(max_examples=300, deadline=None)
@given(lengths, windows, overlaps)
def test_weights_are_a_partition_of_unity(length, window, overlap):
    assume(overlap < window)
    starts = plan_windows(length, window, overlap)
    size = min(window, length)
    weights = blend_weights(starts, size, length)
    assert weights.shape == (len(starts), size)
    assert weights.min() >= 0
    total = np.zeros(length)
    for start, weight in zip(starts, weights):
        total[start : start + size] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)
    if len(starts) == 1:
        assert (weights == 1).all()


def test_two_windows_cross_fade_as_in_the_paper():
    starts = plan_windows(12, 8, 4)
    np.testing.assert_array_equal(starts, [0, 4])
    weights = blend_weights(starts, 8, 12)
    w_orig = np.clip([(4 - 1 - i) / (4 - 2) for i in range(4)], 0, 1)  # 1, 1, 1/2, 0
    np.testing.assert_allclose(weights[0], [1, 1, 1, 1, *w_orig])
    np.testing.assert_allclose(weights[1], [*(1 - w_orig), 1, 1, 1, 1])


def test_no_window_is_squeezed_in_at_the_end():
    np.testing.assert_array_equal(plan_windows(84), [0, 17, 34, 51])
    np.testing.assert_array_equal(plan_windows(83), [0, 25, 50])


def test_where_three_windows_meet_their_ramps_multiply():
    weights = blend_weights(np.array([0, 6, 7]), 9, 16)
    # windows 0 and 1 share frames 6, 7, 8 with ramp 1, 1, 0; 1 and 2 share 7..14 with ramp 1, 1, 5/6, ..., 0
    np.testing.assert_allclose(weights[0], [1] * 8 + [0])
    np.testing.assert_allclose(weights[1], [0, 0, 1, *(np.arange(5, -1, -1) / 6)], atol=1e-7)
    np.testing.assert_allclose(weights[2], [0, 0, *(np.arange(1, 7) / 6), 1], atol=1e-7)


def test_the_plan_of_a_minute():
    starts = plan_windows(376)  # 1,501 frames
    assert len(starts) == 15
    assert set(np.diff(starts)) == {24, 25}
    assert starts[-1] == 376 - 33


@pytest.mark.parametrize(("window", "overlap"), [(33, 33), (33, 40), (33, 2), (33, 0), (33, -1), (3, 3)])
def test_overlaps_that_cannot_be_blended(window, overlap):
    for length in (5, 100):  # also when the video needs no overlap: a bad argument is a bad argument
        with pytest.raises(InputError, match=f"overlap of {overlap}"):
            plan_windows(length, window, overlap)
