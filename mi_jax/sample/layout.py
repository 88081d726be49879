"""How the devices of a machine share the work of one video: windows and guidance branches, or the tokens of each."""

import math

from mi_jax.models.sequence_parallel import ulysses_degree

SEQUENCE_COST = 0.125
"""What sharing tokens over `seq` costs, as a part of the arithmetic: 8 to 15 % on 8 H100s (docs/scale.md). Where a ring
must go around Ulysses, keys and values travel as well; this counts as much again."""


def mesh_shape(windows: int, branches: int, devices: int, heads: int, ulysses: int | None = None) -> tuple[int, int]:
    """The mesh (data, seq) on which one noise level takes the least time, over all of `devices`.

    The batch of a group is its windows times the branches of guidance, and `data` must divide it. Where windows do not
    make whole groups, the last one is filled up with windows that weigh nothing. So one window without guidance is all
    `seq`; many windows are all `data`; and between them, what is computed in vain (`computed_windows`) stands against
    `SEQUENCE_COST`.

    Args:
      windows: of the video (`plan_windows`).
      branches: of guidance (`Guidance.branches`).
      heads: of the denoiser. Any `seq` works; one that shares no divisor with them needs a ring.
      ulysses: the degree that the model prescribes (`DiTConfig.ulysses`), which `seq` must then be a multiple of.
    """

    def cost(data: int) -> tuple[float, int]:
        seq = devices // data
        ring = seq // ulysses_degree(seq, heads, ulysses) if seq > 1 else 1
        sharing = 1 + SEQUENCE_COST * ((seq > 1) + (ring > 1))
        return computed_windows(windows, branches, data) * sharing, -data

    possible = [n for n in range(1, devices + 1) if devices % n == 0]
    fitting = [n for n in possible if n == devices or ulysses is None or (devices // n) % ulysses == 0]
    data = min(fitting, key=cost)
    return data, devices // data


def group_size(branches: int, data: int) -> int:
    """The fewest windows on the network at a time whose branches `data` devices can share evenly."""
    return data // math.gcd(data, branches)


def computed_windows(windows: int, branches: int, data: int) -> int:
    """Windows that the denoiser sees at a noise level, those included that fill up the last group."""
    group = group_size(branches, data)
    return -(-windows // group) * group
