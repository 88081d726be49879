"""Where the windows of a long video lie, and how what they say is blended (paper 4.1.3)."""

import numpy as np
from jaxtyping import Float, Int

from mi_jax.bounds import LatentFrames, fault_of
from mi_jax.errors import InputError


def plan_windows(length: int, window: int = 33, overlap: int = 8) -> Int[np.ndarray, " k"]:
    """First latent frames of the fewest windows that cover `length` latent frames, neighbours sharing `overlap`.

    Where whole windows do not end with the video, all share a little more: they lie as evenly as whole frames allow,
    the last aligned to the end. (`grid_length` gives lengths of which windows share `overlap` exactly.) A video no
    longer than the window is one window of its own length.

    Raises:
      InputError: a window out of bounds; an overlap under 3 (the blend of the paper divides by `overlap - 2`) or not
        under the window.
    """
    check_overlap(window, overlap)
    if length < 1:
        raise InputError(f"a video of {length} latent frames has no window")
    if length <= window:
        return np.zeros(1, np.int32)
    last = length - window
    count = -(-last // (window - overlap)) + 1
    return ((2 * np.arange(count) * last + count - 1) // (2 * (count - 1))).astype(np.int32)


def grid_length(length: int, window: int = 33, overlap: int = 8) -> int:
    """The least length from `length` on whose windows share `overlap` exactly; `length` if one window covers it."""
    if length <= window:
        return length
    step = window - overlap
    return window + -(-(length - window) // step) * step


def check_overlap(window: int, overlap: int) -> None:
    """Raises InputError: see `plan_windows`."""
    fault = fault_of(LatentFrames, window, "window") or fault_of(int, overlap, "overlap")
    if fault:
        raise InputError(fault)
    if overlap < 3:
        raise InputError(f"overlap of {overlap} latent frames is too small, at least 3 are blended")
    if overlap >= window:
        raise InputError(f"overlap of {overlap} latent frames must be smaller than the window of {window}")


def blend_weights(starts: Int[np.ndarray, " k"], window: int, length: int) -> Float[np.ndarray, "k window"]:
    """What each frame of each window weighs in the blend; the weights at every video frame sum to 1.

    Across an overlap of o frames the earlier window weighs `((o - 1) - i) / (o - 2)`, clipped to [0, 1], and the later
    one the rest (paper 4.1.3, whose formula exceeds 1 at i = 0). Where more than two windows meet, a window's ramp in
    and its ramp out multiply, and the weights are divided by their sum. The sum is never 0: at any frame, either some
    window that has taken over has not handed over in full, or all have, down to the last, which hands over to nobody.
    """
    weights = np.ones((len(starts), window))
    for k in range(1, len(starts)):
        overlap = int(starts[k - 1]) + window - int(starts[k])
        if overlap > 0:
            falling = np.clip((overlap - 1 - np.arange(overlap)) / (overlap - 2), 0, 1)
            weights[k - 1, window - overlap :] *= falling
            weights[k, :overlap] *= 1 - falling
    frames = starts[:, None] + np.arange(window)
    total = np.bincount(frames.ravel(), weights.ravel(), minlength=length)
    return (weights / total[frames]).astype(np.float32)
