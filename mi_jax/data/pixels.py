"""Pictures, masks and videos that callers hand over in memory, told from what cannot be meant."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from mi_jax.data import pictures
from mi_jax.data.arrays import array_from, is_floating
from mi_jax.errors import InputError

PICTURE = "a picture file, a PIL image, or an array [H W 3]: uint8, or float from 0 to 1"
MASK = "a picture file, a PIL image, or an array [H W]: bool, from 0 to 1, or uint8"
VIDEO = "an array [f H W 3]: uint8, or float from 0 to 1"
ROUNDING = 1e-3
"""How far below 0 or above 1 what was resized or computed in half precision may reach."""


def pixels_from(picture: Any, name: str) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels of a PIL image, or of a numpy, JAX or PyTorch array or a list.

    Arrays are grey, RGB or RGBA (laid on white), [H W], [H W c] or [c H W], behind axes of length 1; uint8,
    other whole numbers from 0 to 255, uint16 that goes beyond (white is 65535), or floats from 0 to 1.

    Raises InputError: anything else, a side under 16 px, or over 80 million pixels.
    """
    if isinstance(picture, Image.Image):
        pixels = _from_image(picture, name, pictures.rgb_from_image)
    else:
        array = _channels_last(array_from(picture, name, PICTURE), name)
        pixels = _eight_bits(array, name, PICTURE)
        if pixels.shape[2] == 4:
            pixels = pictures.rgb_from_image(Image.fromarray(pixels), name)
        pixels = np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
    _check_size(pixels, name)
    return pixels


def mask_from(mask: Any, name: str) -> Bool[np.ndarray, "H W"]:
    """The marked pixels of a PIL image, or of a numpy, JAX or PyTorch array or a list.

    Arrays are [H W], or [H W c] or [c H W] with channels that are alike, and hold False and True, 0 and 1, 0 and 255,
    or what lies between: half and more is marked.

    Raises InputError: anything else, or no pixel that is marked.
    """
    if isinstance(mask, Image.Image):
        marked = _from_image(mask, name, pictures.mask_from_image)
    else:
        array = array_from(mask, name, MASK)
        if array.ndim != 2:
            array = _channels_last(array, name)
            if array.shape[2] == 4:  # transparent is not marked
                return mask_from(Image.fromarray(_eight_bits(array, name, MASK)), name)
            if np.any(array != array[:, :, :1]):
                raise InputError(f"{name}: a mask is [H W], this is {list(array.shape)}, of channels that differ")
            array = array[:, :, 0]
        if array.dtype == bool:
            marked = array
        elif not array.size:
            marked = np.zeros(array.shape, bool)
        elif array.max() <= 1 or is_floating(array):
            marked = _within(array, 1, name, MASK) >= 0.5
        else:
            marked = pictures.lighter_than_grey(_eight_bits(array, name, MASK), name)
    if not marked.any():
        raise InputError(f"{name}: mask is empty, it marks no pixel")
    return marked


def frames_from(video: Any, name: str) -> UInt8[np.ndarray, "f H W 3"]:
    """RGB frames of one size, of a numpy, JAX or PyTorch array, or a list of frames or of PIL images.

    Raises InputError: anything else, or no frame.
    """
    if isinstance(video, Sequence) and any(isinstance(frame, Image.Image) for frame in video):
        video = [pixels_from(frame, f"{name}, frame {i}") for i, frame in enumerate(video)]
    array = array_from(video, name, VIDEO)
    if array.ndim != 4 or 0 in array.shape or array.shape[3] != 3:
        raise InputError(f"{name}: {list(array.shape)} cannot be meant: give {VIDEO}")
    return array if array.dtype == np.uint8 else _eight_bits(array, name, VIDEO)


def _from_image(image: Image.Image, name: str, read: Any) -> np.ndarray:
    try:
        return read(image, name)
    except InputError:
        raise
    except pictures.DAMAGED as fault:  # PIL reads a file's pixels when they are asked for
        raise InputError(f"{name}: cannot be read ({fault})") from None


def _channels_last(array: np.ndarray, name: str) -> np.ndarray:
    """[H W c] of 1, 3 or 4 channels."""
    kept = array
    while kept.ndim > 3 and kept.shape[0] == 1:
        kept = kept[0]
    if kept.ndim == 2:
        kept = kept[:, :, None]
    if kept.ndim != 3 or 0 in kept.shape or not {1, 3, 4} & {kept.shape[0], kept.shape[2]}:
        raise InputError(f"{name}: {list(array.shape)} cannot be meant: pictures are [H W], [H W 3] or [H W 4]")
    return kept if kept.shape[2] in (1, 3, 4) else kept.transpose(1, 2, 0)


def _eight_bits(array: np.ndarray, name: str, wanted: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if is_floating(array):
        return (_within(array, 1, name, wanted) * 255).round().astype(np.uint8)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2 and array.max() > 255:
        return (array.astype(np.float32) / 257).round().astype(np.uint8)
    if array.dtype.kind not in "iu":
        raise InputError(f"{name}: pixels of {array.dtype} cannot be meant: give {wanted}")
    return _within(array, 255, name, wanted).astype(np.uint8)


def _within(array: np.ndarray, white: int, name: str, wanted: str) -> np.ndarray:
    """The array cut to 0 .. white, from which no value of it is further than rounding."""
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{name}: holds pixels that are not numbers (NaN or infinite)")
    low, high = array.min(), array.max()
    if low < -ROUNDING * white or high > (1 + ROUNDING) * white:
        raise InputError(f"{name}: pixels reach from {low:.5g} to {high:.5g}: give {wanted}")
    return array.clip(0, white)


def _check_size(pixels: np.ndarray, name: str) -> None:
    height, width = pixels.shape[:2]
    if min(height, width) < pictures.MIN_SIDE:
        raise InputError(f"{name}: {width}x{height} is too small (at least {pictures.MIN_SIDE} px a side)")
    if height * width > pictures.MAX_PIXELS:
        raise InputError(f"{name}: {width}x{height} is too large (at most {pictures.MAX_PIXELS:,} pixels)")
