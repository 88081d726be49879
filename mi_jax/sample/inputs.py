"""What a video is made of: whether a model can make it, and reading portraits, voices and masks of any kind."""

import dataclasses
import logging
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from mi_jax.avatar.config import AvatarConfig
from mi_jax.bounds import Seconds, Seed, fault_of, shown
from mi_jax.data import faces, pictures, sound_files
from mi_jax.data.features import latent_mask
from mi_jax.data.moving_masks import is_moving, masks_over_time, on_latent_frames
from mi_jax.data.pixels import pixels_from
from mi_jax.data.samples import mono, samples_from
from mi_jax.data.utterances import Utterances
from mi_jax.errors import InputError
from mi_jax.files import PathLike, digest
from mi_jax.models.prompts import check_prompt
from mi_jax.rates import FPS, SAMPLE_RATE

log = logging.getLogger("mi_jax")

Sound = Any
"""A file, or samples of any library's array or a list."""


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A voice, and the region of the portrait that it moves.

    audio: a file that FFmpeg reads, or samples at 16 kHz (`data.samples.samples_from` says which kinds); or, for
      `Avatar.stream`, an iterator of such samples, piece by piece, that may still be arriving. Several sounds are a
      list of (seconds, sound): when each begins.
    mask: a picture file, or a picture or array (`data.pixels.mask_from` says which kinds) that lies on the portrait,
      and is resized to it; white or True is the face. Four numbers are a box: left, top, right, bottom in pixels of the
      portrait. A video file, or an array [f H W] of the video's frames at 25 fps, moves. None: the face is looked for.
    """

    audio: Sound
    mask: faces.MaskSource | None = None


Portrait = Any
"""A picture file, or what `data.pixels.pixels_from` takes."""


Prompts = Sequence[tuple[float | int, str]]
"""Prompts that change: (second from which on it holds, prompt) of each, the first at 0."""


def sounds(audio: Any) -> list[Any]:
    """One entry per sound: of a list of sounds, of a single one, of None. A list that holds numbers is one sound."""
    if audio is None:
        return []
    single = isinstance(audio, PathLike | bytes | Mapping) or hasattr(audio, "shape") or not isinstance(audio, Iterable)
    if single:
        return [audio]
    audio = list(audio)
    return [audio] if any(isinstance(item, numbers.Number) for item in audio) else audio


def digest_of(value: Any) -> Any:
    """What tells a voice or a mask, as it was read, from any other's (`files.digest`)."""
    if isinstance(value, Utterances):
        return [[start, digest(sound)] for start, sound in value]
    return digest(value.latents if isinstance(value, MovingMask) else value)


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
        raise InputError(f"progress is {shown(progress)}, must be called with (passes done, passes)")


def num_frames(seconds: float) -> int:
    """Video frames of a sound: seconds x 25, rounded, at least one."""
    fault = fault_of(Seconds, seconds, "seconds")
    if fault:
        raise InputError(fault)
    return max(1, round(seconds * FPS))


def read_portrait(portrait: Portrait) -> UInt8[np.ndarray, "H W 3"]:
    """RGB pixels of a file, a PIL image or an array."""
    return pictures.read_image(portrait) if isinstance(portrait, PathLike) else pixels_from(portrait, "portrait")


@dataclasses.dataclass(frozen=True)
class MovingMask:
    """A face mask for every latent frame [t h w] of a video."""

    latents: Float32[np.ndarray, "t h w"]


Masks = Sequence[np.ndarray | MovingMask] | np.ndarray
"""Of each speaker: pixels bool [H W] of the portrait's size, or what moves."""


def find_masks(
    config: AvatarConfig,
    portrait: UInt8[np.ndarray, "H W 3"],
    masks: Sequence[faces.MaskSource | None],
    face_model: PathLike | None = None,
    frames: int | None = None,
) -> list[np.ndarray | MovingMask]:
    """One face mask for each speaker: those given, or of the faces found (`faces.face_masks`). Where they came from is
    logged; a whole picture for want of a face is a warning.

    frames: of the video, which masks that move must be as long as; None: it is not known yet, and none may move.

    Raises:
      InputError: of `faces.face_masks`, of `on_latent_frames`, and of `fit_masks` at the config's size.
    """
    moving = {i: mask for i, mask in enumerate(masks) if isinstance(mask, MovingMask) or is_moving(mask)}
    if moving and frames is None:
        raise InputError("a mask that moves: of voices that are still arriving, how long the video is is not known")
    still = [mask for i, mask in enumerate(masks) if i not in moving]
    if moving and any(mask is None for mask in still):
        given = len(masks) - sum(mask is None for mask in masks)
        raise InputError(f"{given} masks for {len(masks)} speakers: give one mask (--mask) for every speaker, or none")
    found = []
    if still:
        found, origin = faces.face_masks(portrait, len(still), still, model_path=face_model)
        fit_masks(found, *config.padded_size)  # what is wrong with them is said first, and alone
        told = [mask is None or isinstance(mask, PathLike) for mask in still]
        if any(told) or "resized" in origin:
            whole = still[0] is None and bool(found.all())
            log.log(logging.WARNING if whole else logging.INFO, origin)
    found = list(found)
    for i, mask in moving.items():
        if isinstance(mask, MovingMask):
            found.insert(i, mask)
            continue
        name = str(mask) if isinstance(mask, PathLike) else f"mask {i + 1}"
        latents = on_latent_frames(
            masks_over_time(mask, name),
            name,
            portrait=portrait.shape[:2],
            size=config.padded_size,
            stride=config.vae.spatial_stride,
            frames=frames,
            lead_in=config.lead_in,
            per_latent=config.vae.temporal_stride,
        )
        found.insert(i, MovingMask(latents))
    return found


def latent_masks(masks: Masks, config: AvatarConfig) -> Float32[np.ndarray, "s h w"] | Float32[np.ndarray, "s t h w"]:
    """The masks on the latent grid, [s t h w] where any moves.

    Raises InputError: of `fit_masks`.
    """
    height, width = config.padded_size
    still = [mask for mask in masks if not isinstance(mask, MovingMask)]
    fitted = iter([latent_mask(mask, config.vae.spatial_stride) for mask in fit_masks(still, height, width)])
    whole = [mask.latents if isinstance(mask, MovingMask) else next(fitted) for mask in masks]
    if len(still) < len(masks):
        frames = max(len(mask) for mask in whole if mask.ndim == 3)
        whole = [np.broadcast_to(mask, (frames, *mask.shape[-2:])) if mask.ndim == 2 else mask for mask in whole]
    return np.stack(whole)


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


def read_voice(audio: Sound, name: str, seconds: float | None = None) -> Float32[np.ndarray, " n"] | Utterances:
    """Mono samples at 16 kHz of a file, or of samples at 16 kHz, which are called `name` in messages; of several
    sounds, each given with the second at which it begins, `Utterances`.

    Of more than `seconds` only these, but a video frame's at least. Long ones lie on the disk, and can only be read
    (`read_audio`); samples are not copied where they are float32 and mono. Raises InputError: see `read_audio`,
    `samples_from` and `Utterances`.
    """
    seconds = None if seconds is None else max(seconds, 1 / FPS)
    if isinstance(audio, Utterances):
        return audio if seconds is None else audio.until(round(seconds * SAMPLE_RATE))
    if is_timed(audio):
        starts = []
        for start, _ in audio:
            if not (0 <= start < np.inf):
                raise InputError(f"{name}: a sound at {shown(start)} s cannot be meant")
            starts.append(round(float(start) * SAMPLE_RATE))
        sounds = [read_voice(sound, name) for _, sound in audio]
        said = Utterances(name, tuple(starts), tuple(sounds))
        return said if seconds is None else said.until(round(seconds * SAMPLE_RATE))
    if isinstance(audio, PathLike):
        return sound_files.read_audio(audio, seconds=seconds)
    samples = mono(samples_from(audio, name))
    return samples if seconds is None else samples[: round(seconds * SAMPLE_RATE)]


def is_timed(audio: Sound) -> bool:
    """Whether a sound is several, each with its time: a list of (seconds, sound)."""
    if not isinstance(audio, list | tuple) or not audio:
        return False
    return all(isinstance(x, list | tuple) and len(x) == 2 and _is_sound(x[1]) for x in audio)


def _is_sound(value: Any) -> bool:
    return isinstance(value, PathLike) or getattr(value, "ndim", 0) > 0 or (isinstance(value, list) and len(value) > 2)


def read_prompts(prompt: Any) -> list[tuple[float, str]]:
    """(second from which on it holds, prompt), of a sentence, of none, or of such pairs.

    Raises:
      InputError: times that run backwards or do not begin at 0, or of `check_prompt`.
    """
    if prompt is None or isinstance(prompt, str):
        check_prompt(prompt or "")
        return [(0.0, prompt or "")]
    given = list(prompt) if isinstance(prompt, Iterable) else None
    if not given or not all(isinstance(x, list | tuple) and len(x) == 2 for x in given):
        raise InputError(
            f"prompt: a sentence is needed, this is {type(prompt).__name__}; or a list of (seconds, sentence)"
        )
    before = None
    for start, text in given:
        fault = fault_of(float, start, "prompt: its time")
        if fault:
            raise InputError(fault)
        if before is None and start != 0:
            raise InputError(f"prompt: the first holds from {start:g} s on, none before it; begin at 0")
        if before is not None and start <= before:
            raise InputError(f"prompt: from {start:g} s on, after one from {before:g} s on: times run backwards")
        check_prompt(text)
        before = start
    return [(float(start), text) for start, text in given]
