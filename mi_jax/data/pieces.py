"""Sound of hours a piece at a time: what is asked of all its samples takes the memory of a few seconds."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np

PIECE = 2**18
"""Samples that are looked at together: 16 s at 16 kHz, 1 MB of float32."""


@runtime_checkable
class Sliced(Protocol):
    """What gives the samples of a slice: an array [n] or [n c] in memory or on the disk, or a `SoundTrack`."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> np.ndarray: ...


def pieces(length: int) -> Iterator[slice]:
    """Slices of at most `PIECE` samples, one after the other, of `length` in all."""
    for start in range(0, length, PIECE):
        yield slice(start, min(start + PIECE, length))


def peak(samples: Sliced) -> float:
    """How far samples go from zero; 0 where there are none, NaN where one of them is."""
    return float(np.max([np.abs(samples[part]).max(initial=0) for part in pieces(len(samples))], initial=0))


def all_finite(samples: Sliced) -> bool:
    """Whether no sample is NaN or infinite."""
    return all(bool(np.isfinite(samples[part]).all()) for part in pieces(len(samples)))
