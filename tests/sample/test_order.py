"""Orders of passes: each is done once, after all that it needs, in groups that are full and memory that is bounded."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_jax.sample.order import Order, Pass, held_windows, next_group, reach_of

ORDERS = ("level", "wavefront", "causal")


def groups(order: Order, windows: int, levels: int, reach: int, group: int) -> Iterator[tuple[list[Pass], int]]:
    """(group, the earliest window that was not done before it) until all is done."""
    done, first = [0] * windows, 0
    while first < windows:
        chosen = next_group(done[first:], first, True, order=order, levels=levels, reach=reach, group=group)
        yield chosen, first
        for pass_ in chosen:
            assert done[pass_.window] == pass_.level
            done[pass_.window] += 1
        assert chosen
        while first < windows and done[first] == levels:
            first += 1


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ORDERS), st.integers(1, 20), st.integers(1, 8), st.integers(1, 4), st.integers(1, 9))
def test_every_pass_comes_once_and_after_what_it_needs(order, windows, levels, reach, group):
    when: dict[Pass, int] = {}
    held = held_windows(order, levels, reach, group)
    for number, (chosen, first) in enumerate(groups(order, windows, levels, reach, group)):
        assert len(chosen) <= group
        for place, pass_ in enumerate(chosen):
            assert pass_ not in when
            when[pass_] = number
            assert held is None or pass_.window < first + held
            if order == "causal":
                assert pass_.window == first
                continue
            near = range(max(0, pass_.window - reach), min(windows, pass_.window + reach + 1))
            if pass_.level:
                assert all(when[Pass(window, pass_.level - 1)] < number for window in near)
            # Sums over windows go from left to right.
            left = [Pass(window, pass_.level) for window in near if window < pass_.window]
            assert all(before in when or before in chosen[:place] for before in left)
    assert len(when) == windows * levels


@pytest.mark.parametrize(("levels", "passes"), [(4, 10), (25, 325)])
def test_the_first_window_is_done_after_a_triangle_of_passes(levels, passes):
    """Docs say so: levels (levels + 1) / 2, whatever the length, where a window shares frames with one neighbour."""
    for windows in (30, 60):
        before = 0
        for chosen, first in groups("wavefront", windows, levels, 1, 1):
            if first:
                break
            before += len(chosen)
        assert before == passes


@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("levels", [4, 25])
def test_a_wavefront_fills_its_groups(levels, group):
    """Docs say so: what is computed level by level takes at most as many groups less as there are levels, but one."""
    calls = {order: len(list(groups(order, 100, levels, 1, group))) for order in ("level", "wavefront")}
    assert -(-100 * levels // group) <= calls["level"] <= calls["wavefront"] < calls["level"] + levels


def test_before_the_next_window_is_known_only_what_does_not_need_it_is_done():
    told = {"order": "wavefront", "levels": 2, "reach": 1, "group": 4}
    assert next_group([0], 0, False, **told) == [Pass(0, 0)]
    assert next_group([1], 0, False, **told) == []  # window 1 must have passed level 0
    assert next_group([1], 0, True, **told) == [Pass(0, 1)]
    assert next_group([1, 0], 0, False, **told) == [Pass(1, 0)]
    assert next_group([1, 1], 0, False, **told) == [Pass(0, 1)]
    assert next_group([2, 1], 0, True, **told) == [Pass(1, 1)]


@pytest.mark.parametrize(("starts", "window", "reach"), [([0], 9, 0), ([0, 5, 10], 9, 1), ([0, 2, 4, 6], 9, 3)])
def test_windows_reach_as_far_as_they_share_frames(starts, window, reach):
    assert reach_of(starts, window) == reach
