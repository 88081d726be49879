"""What a video is asked to be: read and checked as a whole, before a model is loaded or anything is computed."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from mi_jax.avatar.config import AvatarConfig
from mi_jax.bounds import fault_of
from mi_jax.data import sound, video_files
from mi_jax.data.utterances import Utterances
from mi_jax.errors import InputError
from mi_jax.files import PathLike, digest
from mi_jax.rates import FPS, SAMPLE_RATE
from mi_jax.sample.inputs import (
    Masks,
    Portrait,
    Prompts,
    Sound,
    Speaker,
    check_options,
    check_request,
    digest_of,
    find_masks,
    is_live,
    num_frames,
    read_portrait,
    read_prompts,
    read_speakers,
    read_voice,
)
from mi_jax.sample.order import Order
from mi_jax.sample.sizes import check_device_memory
from mi_jax.sample.windows import check_overlap

LIVE_WINDOW = 112
"""Latent frames: wav2vec2 hears the last 20 s of a sound that is still arriving."""

log = logging.getLogger("mi_jax")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A video that can be made (`Avatar.make`).

    config: the model's, with the sizes, steps and guidance that are asked for.
    voices: samples, `Utterances`, or iterators of samples that are still arriving; one for each of `masks`.
    prompts: (second from which on it holds, prompt).
    frames: of the video; None: voices are still arriving, and it ends with them, or after `seconds`.
    """

    config: AvatarConfig
    portrait: UInt8[np.ndarray, "H W 3"] | None
    voices: Sequence[Any]
    masks: Masks
    prompts: Sequence[tuple[float, str]]
    frames: int | None
    seconds: float | None
    seed: int
    window: int
    overlap: int
    order: Order
    progress: Callable[[int, int | None], None] | None = None

    def described(self) -> dict[str, Any]:
        """What tells it from any other request, as JSON; contents by their digests. Of voices that are all there."""
        return {
            "portrait": None if self.portrait is None else digest(self.portrait),
            "audio": [digest_of(voice) for voice in self.voices],
            "mask": [digest_of(mask) for mask in self.masks],
            "prompt": list(self.prompts),
            "seconds": self.frames / FPS,
            "config": repr(self.config),
            **{name: getattr(self, name) for name in ("seed", "window", "overlap", "order")},
        }


def read_request(
    config: AvatarConfig,
    portrait: Portrait | None = None,
    speakers: Sequence[Speaker | Sound] | Speaker | Sound | None = (),
    prompt: str | Prompts | None = "",
    *,
    seed: int = 0,
    window: int = 33,
    overlap: int = 8,
    order: Order = "wavefront",
    seconds: float | None = None,
    face_model: PathLike | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    steps: int | None = None,
    guidance_audio: float | None = None,
    guidance_text: float | None = None,
    height: int | None = None,
    width: int | None = None,
    out: PathLike | None = None,
) -> Request:
    """Reads and checks what `Avatar.animate` is asked for; its arguments, for a model of this config.

    out: the file that the video goes to, whose disk must hold it.

    Raises:
      InputError: as there.
    """
    speakers, prompts = read_speakers(speakers), read_prompts(prompt)
    check_options(face_model=face_model, progress=progress)
    fault = fault_of(Order, order, "order")
    if fault:
        raise InputError(fault)
    config = config.replace(
        steps=steps, guidance_audio=guidance_audio, guidance_text=guidance_text, height=height, width=width
    )
    check_request(config, portrait=portrait is not None, voices=len(speakers), seconds=seconds, seed=seed)
    check_overlap(window, overlap)
    live = any(is_live(speaker.audio) for speaker in speakers)
    if live and order == "level":
        raise InputError('order "level" needs the length of the video before it begins')
    if live and window > LIVE_WINDOW:
        raise InputError(f"window is {window}: of voices that are still arriving at most {LIVE_WINDOW} latent frames")
    pixels = None if portrait is None else read_portrait(portrait)
    voices = [
        speaker.audio if is_live(speaker.audio) else read_voice(speaker.audio, f"voice {i}", seconds)
        for i, speaker in enumerate(speakers, 1)
    ]
    whole = {i: voice for i, voice in enumerate(voices, 1) if not is_live(voice)}
    longest = max(map(len, whole.values()), default=0) / SAMPLE_RATE
    frames = None if live else num_frames(longest if seconds is None else seconds)
    if out is not None and frames is not None:
        video_files.check_space(out, frames, config.height, config.width)
    check_device_memory(config, frames, window, overlap, order)
    for i, voice in whole.items():
        for said in voice.sounds if isinstance(voice, Utterances) else [voice]:
            for remark in sound.remarks(said, f"voice {i}"):
                log.warning("%s", remark)
    masks = []
    if speakers:
        masks = find_masks(config, pixels, [speaker.mask for speaker in speakers], face_model, frames)
    return Request(
        config=config, portrait=pixels, voices=voices, masks=masks, prompts=prompts, frames=frames, seconds=seconds,
        seed=seed, window=window, overlap=overlap, order=order, progress=progress,
    )  # fmt: skip
