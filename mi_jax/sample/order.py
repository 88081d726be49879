"""In which order the windows of a long video pass through the denoiser, level by level of noise.

A window at level j needs of itself and of its neighbours (those within `reach`, which share frames with it) only that
they have passed level j - 1. All else is free, and decides memory and waiting, not the video:

- `level`: every window at a level before any at the next, as the paper writes it. Needs the whole video.
- `wavefront`: always what is needed for the earliest frames that are not done. A frame is done once the windows after
  it are far enough, each a level less; how many are under way does not depend on the length of the video.
- `causal`: a window passes all levels before the next begins, which takes the frames that both share as they are. Waits
  for nothing but the window, and is another video: what was said is not reconsidered.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

Order = Literal["level", "wavefront", "causal"]


class Pass(NamedTuple):
    """One window through the denoiser, at one level of noise: the first is 0."""

    window: int
    level: int


def next_group(
    done: Sequence[int], first: int, ended: bool, *, order: Order, levels: int, reach: int, group: int
) -> list[Pass]:
    """The next passes, at most `group`, none of which needs another's result. Empty: nothing can be done before the
    next window is there, or everything is done.

    Passes of windows that share frames come from left to right, so that sums over windows do not depend on the order.

    Args:
      done: levels that window `first`, and each known one after it, has passed. Those before have passed all.
      ended: there are no windows after these.
      reach: how many windows to each side share frames with one (`reach_of`).
      group: how many passes the network takes at a time.
    """
    chosen: list[Pass] = []
    taken: set[Pass] = set()
    most = len(done) if order == "level" else min(len(done), held_windows(order, levels, reach, group))

    def passed(window: int, level: int, beside: bool) -> bool:
        """Whether a window has passed `level`, or does so in this group (`beside`)."""
        if window < first or level < 0:
            return True
        if window - first >= len(done):
            return ended
        return done[window - first] > level or (beside and Pass(window, level) in taken)

    def ready(window: int, level: int) -> bool:
        if order == "causal":
            return window == first
        left = range(window - reach, window)
        right = range(window + 1, window + reach + 1)
        return all(passed(v, level - 1, False) and passed(v, level, True) for v in left) and all(
            passed(v, level - 1, False) for v in right
        )

    def urgency(p: Pass) -> tuple[int, int]:
        return (p.level, p.window) if order == "level" else (p.window + reach * p.level, p.level)

    waiting = [Pass(first + i, level) for i, level in enumerate(done[:most]) if level < levels]
    for candidate in sorted(waiting, key=urgency):
        if len(chosen) == group:
            break
        if ready(*candidate):
            chosen.append(candidate)
            taken.add(candidate)
    return sorted(chosen, key=lambda p: (p.level, p.window))


def held_windows(order: Order, levels: int, reach: int, group: int) -> int | None:
    """How many windows, from the earliest that is not done, are under way at most; None: all of the video's."""
    if order == "level":
        return None
    if order == "causal":
        return 1
    # One pass at a time follows a diagonal, which reaches `reach` windows further with every level. Passes side by side
    # share no frames unless they are at one level, and need more room.
    return reach * (levels - 1) + 1 if group == 1 else (reach + 1) * (levels - 1) + group


def reach_of(starts: Sequence[int], window: int) -> int:
    """How many windows after one share frames with it, at most."""
    return max((int(np.searchsorted(starts, start + window)) - i - 1 for i, start in enumerate(starts)), default=0)
