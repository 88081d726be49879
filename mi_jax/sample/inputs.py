"""What a video is made of: whether a model can make it, and reading portraits, voices and masks of any kind."""

import dataclasses
import logging
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from mi_jax.avatar.config import AvatarConfig
from mi_jax.bounds import Seconds, Seed, fault_of, shown
from mi_jax.data import faces, pictures, sound_files
from mi_jax.data.pixels import pixels_from
from mi_jax.data.samples import mono, samples_from
from mi_jax.errors import InputError
from mi_jax.files import PathLike
from mi_jax.rates import FPS, SAMPLE_RATE

log = logging.getLogger("mi_jax")

Sound = Any
"""A file, or samples of any library's array or a list."""


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A voice, and the region of the portrait that it moves.

    audio: a file that FFmpeg reads, or samples at 16 kHz (`data.samples.samples_from` says which kinds); or, for
      `Avatar.stream`, an iterator of such samples, piece by piece, that may still be arriving.
    mask: a picture file, or a picture or array (`data.pixels.mask_from` says which kinds) that lies on the portrait,
      and is resized to it; white or True is the face. None: it is looked for.
    """

    audio: Sound
    mask: faces.MaskSource | None = None


Portrait = Any
"""A picture file, or what `data.pixels.pixels_from` takes."""


def sounds(audio: Any) -> list[Any]:
    """One entry per sound: of a list of sounds, of a single one, of None. A list that holds numbers is one sound."""
    if audio is None:
        return []
    single = isinstance(audio, PathLike | bytes | Mapping) or hasattr(audio, "shape") or not isinstance(audio, Iterable)
    if single:
        return [audio]
    audio = list(audio)
    return [audio] if any(isinstance(item, numbers.Number) for item in audio) else audio


def read_speakers(speakers: Any) -> list[Speaker]:
    """Speakers of a list of them, or of sounds; or of a single one.

    Raises:
      InputError: a mapping, which names no order.
    """
    if isinstance(speakers, Mapping):
        raise InputError("speakers is a mapping: give a list of mi_jax.Speaker(audio, mask) or of sounds")
    return [speaker if isinstance(speaker, Speaker) else Speaker(speaker) for speaker in sounds(speakers)]


def check_request(config: AvatarConfig, *, portrait: bool, voices: int, seconds: float | None, seed: int) -> None:
    """Whether a model can make a video of what it is given; asked before anything large is loaded.

    Raises:
      InputError: a portrait, voices or a length are missing, or given to a model that has no use for them.
    """
    sees, hears = config.dit.image_to_video or config.dit.token_replace, config.dit.audio is not None
    if sees and not portrait:
        raise InputError("no portrait: this model animates one")
    if portrait and not sees:
        raise InputError("this model makes videos from text alone, not from a portrait")
    if voices and not hears:
        raise InputError("this model has no audio attention: it makes silent videos, without voices")
    if not voices and seconds is None:
        raise InputError(f"no {'voice and no ' * hears}length: a silent video needs its length in seconds")
    if seconds is not None:
        num_frames(seconds)  # in its bounds
    fault = fault_of(Seed, seed, "seed")
    if fault:
        raise InputError(fault)


def is_live(audio: Sound) -> bool:
    """Whether a sound comes piece by piece."""
    return isinstance(audio, Iterator)


def check_options(*, face_model: Any, progress: Any) -> None:
    """Raises InputError where what is no number is of another kind than is asked for."""
    if not isinstance(face_model, PathLike | None):
        raise InputError(f"face_model is {shown(face_model)}, must be a file")
    if progress is not None and not callable(progress):
        raise InputError(f"progress is {shown(progress)}, must be called with (steps done, steps)")


def num_frames(seconds: float) -> int:
    """Video frames of a sound: seconds x 25, rounded, at least one."""
    fault = fault_of(Seconds, seconds, "seconds")
    if fault:
        raise InputError(fault)
    return max(1, round(seconds * FPS))


def read_portrait(portrait: Portrait) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels of a file, a PIL image or an array."""
    return pictures.read_image(portrait) if isinstance(portrait, PathLike) else pixels_from(portrait, "portrait")


def find_masks(
    config: AvatarConfig,
    portrait: UInt8[np.ndarray, "H W 3"],
    masks: Sequence[faces.MaskSource | None],
    face_model: PathLike | None = None,
) -> Bool[np.ndarray, "s H W"]:
    """One face mask for each speaker, at the portrait's size: those given, or of the faces found (`faces.face_masks`).
    Where they came from is logged; a whole picture for want of a face is a warning.

    Raises:
      InputError: of `faces.face_masks`, and of `fit_masks` at the config's size.
    """
    found, origin = faces.face_masks(portrait, len(masks), masks, model_path=face_model)
    fit_masks(found, *config.padded_size)  # what is wrong with them is said first, and alone
    told = [mask is None or isinstance(mask, PathLike) for mask in masks]
    if any(told) or "resized" in origin:
        whole = masks[0] is None and bool(found.all())
        log.log(logging.WARNING if whole else logging.INFO, origin)
    return found


def fit_masks(masks: Sequence[np.ndarray] | np.ndarray, height: int, width: int) -> list[np.ndarray]:
    """The masks of a portrait's faces, cropped and scaled with it to the video's size.

    Raises:
      InputError: of a face nothing is left.
    """
    fitted = [pictures.fit_mask(mask, height, width) for mask in masks]
    for number, mask in enumerate(fitted, 1):
        if not mask.any():
            raise InputError(
                f"voice {number}: its face lies outside the part of the portrait that a video of {width}x{height} "
                "shows, or is too small there; give another height and width, or crop the portrait"
            )
    return fitted


def read_voice(audio: Sound, name: str, seconds: float | None = None) -> Float32[np.ndarray, " n"]:
    """Mono samples at 16 kHz of a file, or of samples at 16 kHz, which are called `name` in messages.

    Of more than `seconds` only these, but a video frame's at least. Long ones lie on the disk, and can only be read
    (`read_audio`); samples are not copied where they are float32 and mono. Raises InputError: see `read_audio` and
    `samples_from`.
    """
    seconds = None if seconds is None else max(seconds, 1 / FPS)
    if isinstance(audio, PathLike):
        return sound_files.read_audio(audio, seconds=seconds)
    samples = mono(samples_from(audio, name))
    return samples if seconds is None else samples[: round(seconds * SAMPLE_RATE)]
