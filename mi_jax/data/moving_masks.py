"""Masks that move with a face: a video, or an array of pictures, on the latent grid."""

import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from einops import reduce
from jaxtyping import Bool, Float32
from PIL import Image

from mi_jax.data import pictures, video_files
from mi_jax.errors import InputError
from mi_jax.files import PathLike
from mi_jax.rates import FPS


def is_moving(mask: Any) -> bool:
    """Whether a mask is a video file, or an array [f H W] of more than four pictures (less are channels)."""
    if isinstance(mask, PathLike):
        return pathlib.Path(mask).suffix.lower() in (*video_files.VIDEO_SUFFIXES, ".webm", ".avi")
    return getattr(mask, "ndim", 0) == 3 and mask.shape[0] > 4 and mask.shape[2] > 4


def masks_over_time(mask: Any, name: str) -> Iterator[Bool[np.ndarray, "H W"]]:
    """One picture for each frame at 25 fps: of a video at another rate the one that is shown then.

    Raises InputError: a file that is no video; an array of other than 0 and 1, or 0 and 255.
    """
    if isinstance(mask, PathLike):
        shown = 0
        for number, (picture, rate) in enumerate(video_files.each_frame(mask), 1):
            while shown * rate / FPS < number - 1e-6:  # until the next picture is shown
                yield picture.mean(axis=2) >= 128
                shown += 1
        return
    for picture in mask:
        values = np.asarray(picture)
        if values.dtype != bool and not np.isin(values, (0, 1, 255)).all():
            raise InputError(f"{name}: a mask that moves holds 0 and 1, or 0 and 255")
        yield values > 0


def on_latent_frames(
    masks: Iterable[Bool[np.ndarray, "H W"]],
    name: str,
    *,
    portrait: tuple[int, int],
    size: tuple[int, int],
    stride: int,
    frames: int,
    lead_in: int,
    per_latent: int,
) -> Float32[np.ndarray, "t h w"]:
    """Where a mask marks anything, for every latent frame of a video of `frames`, each the union over its own.

    portrait: its height and width, which masks of another aspect are resized to. size: of the video in pixels, that the
    networks run at. stride, per_latent: pixels and frames of a latent. lead_in: frames before the first one shown,
    which have its mask.

    Raises:
      InputError: there are fewer masks than frames, or they mark nothing that the video shows.
    """
    latent_frames = -(-(lead_in + frames - 1) // per_latent) + 1
    marked = np.zeros((latent_frames, size[0] // stride, size[1] // stride), np.float32)
    count, fitted = 0, None
    for count, mask in enumerate(masks, 1):
        if mask.shape[0] * portrait[1] != mask.shape[1] * portrait[0]:
            mask = np.array(Image.fromarray(mask).resize(portrait[::-1], Image.Resampling.NEAREST))
        fitted = reduce(pictures.fit_mask(mask, *size), "(h p) (w q) -> h w", "max", p=stride, q=stride)
        shown = lead_in + count - 1
        first = 0 if count == 1 else -(-shown // per_latent)
        marked[first : -(-shown // per_latent) + 1] = np.maximum(marked[first : -(-shown // per_latent) + 1], fitted)
        if count == frames:
            break
    if count < frames:
        raise InputError(f"{name}: a mask of {count / FPS:.2f} s for a video of {frames / FPS:.2f} s")
    if not marked.any():
        raise InputError(f"{name}: mask is empty where the video is, it marks no pixel")
    return marked
