"""A video with its sound becomes a file."""

import logging
from collections.abc import Sequence
from typing import Any

from mi_jax.bounds import shown
from mi_jax.data import sound_files, video_files
from mi_jax.data.pieces import peak
from mi_jax.data.pixels import frames_from
from mi_jax.data.samples import samples_from
from mi_jax.data.sound_track import SoundTrack
from mi_jax.errors import InputError
from mi_jax.files import PathLike
from mi_jax.rates import FPS, SAMPLE_RATE
from mi_jax.sample.inputs import Sound, Speaker, is_timed, sounds

log = logging.getLogger("mi_jax")


def save_video(
    path: PathLike,
    video: Any,
    audio: Sound | Speaker | Sequence[Sound | Speaker] | None = None,
    *,
    frames: int | None = None,
) -> None:
    """Writes a video of 25 fps with its sound, cut or filled with silence to its length; stereo where a sound is.

    Args:
      path: .mp4, .m4v, .mov or .mkv, in a folder that exists.
      video: frames [f H W 3], uint8 RGB (`data.pixels.frames_from` says what else); or, with `frames`, an iterator of
        some of them after the other (`Avatar.stream`), of so many in all.
      audio: a sound file, samples at 16 kHz (see `samples_from`), a speaker, or a list of several of these,
        which are mixed.

    Raises:
      InputError: the frames or a sound cannot be read, or the file cannot be written.
    """
    if not isinstance(path, PathLike):
        raise InputError(f"save_video: {shown(path)} is no path")
    path = video_files.check_video_path(path)
    if frames is None:
        video = frames_from(video, "video")
        frames = len(video)
    else:
        video = (frame for piece in video for frame in piece)
    track, rate = sound_of(audio, frames)
    video_files.write_video(path, video, track, sample_rate=rate)


def sound_of(audio: Sound | Speaker | Sequence[Sound | Speaker] | None, frames: int) -> tuple[SoundTrack | None, int]:
    """The sound of a video of so many frames, None where there is none, and its sample rate. As for `save_video`.

    Raises:
      InputError: a sound cannot be read.
    """
    given = [source.audio if isinstance(source, Speaker) else source for source in sounds(audio)]
    timed = [said for source in given for said in (source if is_timed(source) else [(0.0, source)])]
    sources = [source for _, source in timed]
    if not sources:
        return None, SAMPLE_RATE
    seconds = frames / FPS
    # files keep more than the 16 kHz that the model hears
    rate = 48_000 if all(isinstance(source, PathLike) for source in sources) else SAMPLE_RATE
    voices = []
    for number, source in enumerate(sources, 1):
        if isinstance(source, PathLike):
            voices.append(sound_files.read_audio(source, rate, stereo=True, seconds=seconds))
        else:
            voices.append(samples_from(source, "audio" if len(sources) == 1 else f"audio {number}"))
    mixed = SoundTrack(voices, round(seconds * rate), [round(start * rate) for start, _ in timed])
    if rate == SAMPLE_RATE and (loudest := peak(mixed)) > 1:
        log.warning("audio: reaches %.2f times full scale, cut off at 1 in the video", loudest)
    return mixed, rate
