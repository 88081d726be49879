"""Samples that callers hand over: arrays of any library and lists, told from what cannot be meant."""

from typing import Any

import numpy as np
from jaxtyping import Float32

from mi_jax.data.arrays import array_from, is_floating
from mi_jax.data.pieces import all_finite, peak, pieces
from mi_jax.data.sound import lost_in_mix
from mi_jax.errors import InputError

FULL_SCALE = {"int8": (0, 2**7), "uint8": (2**7, 2**7), "int16": (0, 2**15), "int32": (0, 2**31)}
"""Of whole numbers: what silence is, and how far from it they go."""
MAX_PEAK = 10.0
"""Times full scale: a float sound that goes further is no loud one, but whole numbers that were not scaled."""


def samples_from(audio: Any, name: str) -> Float32[np.ndarray, "n c"]:
    """Sound of one or two channels, full scale at 1, of a numpy, JAX or PyTorch array or a list. An array of float32 is
    not copied, wherever it lies.

    Args:
      audio: [n], [n 1], [n 2], [1 n] or [2 n], with further axes of length 1: floats with full scale at 1 (they may go
        beyond it), or int8, int16, int32 or uint8 with the full scale of their kind.
      name: what the sound is called in messages.

    Raises InputError: anything else, no sample, samples that are not finite, or beyond ten times full scale.
    """
    array = array_from(audio, name, "a sound file, or samples at 16 kHz")
    kept = np.squeeze(array) if array.size != 1 else array.reshape(1)  # one sample is a sound of one sample
    wanted = f"{name}: samples are [n] or [n 2], float with full scale at 1, int8, int16, int32 or uint8"
    floating = is_floating(array)
    if not floating and array.dtype.name not in FULL_SCALE:
        raise InputError(f"{wanted}; these are {array.dtype}")
    if array.size == 0:
        raise InputError(f"{name}: sound without a single sample")
    if array.ndim == 0 or kept.ndim > 2 or (kept.ndim == 2 and 2 not in kept.shape):
        raise InputError(f"{wanted}; these are {list(array.shape)}")
    if kept.ndim == 1:
        kept = kept[:, None]
    elif kept.shape[1] != 2:
        kept = kept.T
    if not floating:
        silence, scale = FULL_SCALE[array.dtype.name]
        return ((kept.astype(np.float64) - silence) / scale).astype(np.float32)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which is said below
        samples = kept.astype(np.float32, copy=False)
    if not all_finite(samples):
        raise InputError(f"{name}: sound holds samples that are not numbers (NaN or infinite)")
    loudest = peak(samples)
    if loudest > MAX_PEAK:
        raise InputError(f"{name}: samples reach {loudest:.5g}, but full scale is 1 (16-bit samples: divide by 32768)")
    return samples


def mono(samples: Float32[np.ndarray, "n c"]) -> Float32[np.ndarray, " n"]:
    """The mean of two channels, or the louder one where they cancel each other out."""
    if samples.shape[1] == 1:
        return samples[:, 0]
    mixed = samples.mean(axis=1, dtype=np.float32)
    power, mixed_power = np.zeros(2), 0.0
    for part in pieces(len(samples)):
        power += np.square(samples[part]).sum(axis=0, dtype=np.float64)
        mixed_power += float(np.square(mixed[part]).sum(dtype=np.float64))
    lone = lost_in_mix(power, mixed_power)
    return mixed if lone is None else samples[:, lone]
