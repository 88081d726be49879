"""The mesh that is chosen for a video, and how many windows it computes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mi_jax.sample.layout import computed_windows, group_size, mesh_shape


@pytest.mark.parametrize(
    ("windows", "branches", "devices", "heads", "expected"),
    [
        (1, 1, 1, 24, (1, 1)),
        (1, 1, 8, 24, (1, 8)),  # one window of a distilled model: its tokens
        (1, 1, 8, 4, (1, 8)),  # four heads: Ulysses over four and a ring of two, still less than two windows
        (1, 2, 8, 24, (2, 4)),  # two branches: half of the devices each
        (1, 3, 8, 24, (1, 8)),  # three branches do not share out over eight
        (1, 3, 6, 24, (3, 2)),
        (2, 1, 8, 24, (2, 4)),
        (4, 2, 8, 24, (8, 1)),
        (8, 1, 8, 24, (8, 1)),
        (3, 3, 8, 24, (1, 8)),  # windows four abreast would compute a third in vain
        (23, 3, 8, 24, (8, 1)),  # 24 windows instead of 23 cost less than to share tokens
        (7, 1, 8, 4, (8, 1)),  # as long as there is no ring: that costs more than the eighth window
        (7, 1, 8, 24, (1, 8)),
        (1, 1, 7, 24, (1, 7)),  # a ring alone
        (1000, 1, 64, 24, (64, 1)),
    ],
)
def test_the_mesh_that_fits(windows, branches, devices, heads, expected):
    assert mesh_shape(windows, branches, devices, heads) == expected


def test_a_prescribed_ulysses_degree_divides_seq():
    assert mesh_shape(1, 1, 12, 24, ulysses=4) == (1, 12)
    assert mesh_shape(1, 2, 6, 24) == (2, 3)
    assert mesh_shape(1, 2, 6, 24, ulysses=2) == (1, 6)


@given(*[st.integers(1, 40)] * 3, st.sampled_from([2, 4, 24]))
def test_laws(windows, branches, devices, heads):
    data, seq = mesh_shape(windows, branches, devices, heads)
    assert data * seq == devices
    group = group_size(branches, data)
    assert group * branches % data == 0
    assert all(less * branches % data for less in range(1, group))
    computed = computed_windows(windows, branches, data)
    assert computed % group == 0
    assert windows <= computed <= 1.25 * windows
    if windows * branches % devices == 0:
        assert (data, seq, computed) == (devices, 1, windows)
    assert computed_windows(windows, branches, math.gcd(devices, windows * branches)) == windows
