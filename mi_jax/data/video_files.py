"""Video in and out of files, by PyAV (no ffmpeg binary).

Every fault of a file is an `InputError` of one line that names the file and what is wrong with it. Files are written
beside their final name and renamed when whole, so a reader never meets half a video.
"""

import logging
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import numpy as np
from jaxtyping import Float32, UInt8

from mi_jax.data.containers import Losses, decoded, opened, track
from mi_jax.data.pieces import PIECE, all_finite
from mi_jax.data.sound_track import SoundTrack
from mi_jax.errors import InputError
from mi_jax.files import PathLike, check_writable, existing_file, written_beside
from mi_jax.rates import FPS, SAMPLE_RATE

log = logging.getLogger("mi_jax")

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv")  # containers that hold H.264 and AAC
LEAST_BITS = 0.05
"""Of a pixel in a frame. Puppets take 0.5 at 96x96; the larger a picture and the smoother, the less."""


def check_video_path(path: PathLike) -> pathlib.Path:
    """As `check_writable`, for a video: the suffix must name a container for H.264 and AAC."""
    path = pathlib.Path(path)
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise InputError(f"{path}: the name of a video must end in one of {', '.join(VIDEO_SUFFIXES)}")
    return check_writable(path)


def check_space(path: PathLike, frames: int, height: int, width: int) -> None:
    """Raises InputError where not even a video of little movement fits on the disk (`LEAST_BITS`)."""
    needed, free = frames * height * width * LEAST_BITS / 8, shutil.disk_usage(pathlib.Path(path).parent).free
    if needed > free:
        raise InputError(
            f"{path}: {frames / FPS:.0f} s of video take {needed / 1e6:.0f} MB at least, {free / 1e6:.0f} MB are free"
        )


def read_video(path: PathLike) -> tuple[UInt8[np.ndarray, "f H W 3"], float]:
    """All frames of a video as RGB, upright by its rotation tag, and its frames per second.

    Of several tracks the one that FFmpeg takes. What cannot be decoded is left out, and said in the log.

    Raises InputError: missing, unreadable, or without a frame, or of frames of several sizes.
    """
    frames, rate = [], float(FPS)
    for frame, rate in each_frame(path):  # noqa: B007
        frames.append(frame)
    return np.stack(frames), rate


def each_frame(path: PathLike) -> Iterator[tuple[UInt8[np.ndarray, "H W 3"], float]]:
    """The same one by one, each with the video's frames per second."""
    path = existing_file(path, "video")
    losses, size = Losses(), None
    with opened(path, "a video") as container:
        stream = track(path, container, "video", "picture track")
        rate = float(stream.average_rate or stream.guessed_rate or FPS)
        for frame in map(_upright, decoded(container, stream, losses)):
            if size not in (None, frame.shape):
                raise InputError(f"{path}: video whose pictures change their size")
            size = frame.shape
            yield frame, rate
        if size is None and losses.fault is not None:
            raise losses.fault
    if size is None:
        raise InputError(f"{path}: video without a single frame")
    losses.warn(path)


def _upright(frame: av.VideoFrame) -> np.ndarray:
    pixels = frame.to_ndarray(format="rgb24")
    return np.rot90(pixels, k=round(frame.rotation / 90)) if frame.rotation else pixels


def write_video(
    path: PathLike,
    frames: UInt8[np.ndarray, "f H W 3"] | Iterable[np.ndarray],
    audio: Float32[np.ndarray, " n"] | Float32[np.ndarray, "n c"] | SoundTrack | None = None,
    *,
    fps: int = FPS,
    sample_rate: int = SAMPLE_RATE,
    crf: int = 16,
) -> None:
    """Writes H.264 (yuv420p, BT.709) and, where `audio` is given, AAC.

    Args:
      path: ends in .mp4, .m4v, .mov or .mkv; its folder exists.
      frames: an array or an iterator of uint8 RGB frames of one size; odd sizes grow to `written_size` by repeating
        their last row or column.
      audio: samples in [-1, 1] (clipped there), mono or one or two channels last; read piece by piece.
      crf: x264's constant quality; lower is better and larger.

    Raises: InputError where the file cannot be written, or frames are too wide or high for H.264; ValueError for no
    frame, or audio that is not finite.
    """
    path = check_video_path(path)
    if audio is not None:
        if _channels(audio) not in (1, 2):
            raise ValueError(f"audio has {_channels(audio)} channels, 1 or 2 can be written")
        if not all_finite(audio):
            raise ValueError("audio holds samples that are not finite")
    with written_beside(path) as partial, av.open(f"file:{partial}", "w", options=_muxer_options(path)) as container:
        video, sound, written = None, None, 0
        for index, pixels in enumerate(frames):
            if video is None:
                video = add_video(container, pixels.shape, fps, crf)
                sound = None if audio is None else add_sound(container, audio, sample_rate)
            container.mux(encoded(video, picture(pixels, index), path))
            if sound is not None:  # the sound under this frame follows it: neither track waits in memory
                until = (index + 1) * sample_rate // fps
                written = mux_sound(container, sound, audio, written, until)
        if video is None:
            raise ValueError(f"{path}: no frame to write")
        container.mux(video.encode(None))
        if sound is not None:
            while written < len(audio):
                written = mux_sound(container, sound, audio, written, written + PIECE)
            container.mux(sound.encode(None))


_BT709 = 1  # the same number in FFmpeg's matrix, primaries and transfer lists (ITU-T H.273)
_LIMITED = 1  # AVCOL_RANGE_MPEG


def _muxer_options(path: pathlib.Path) -> dict[str, str]:
    return {} if path.suffix.lower() == ".mkv" else {"movflags": "+faststart"}


def written_size(height: int, width: int) -> tuple[int, int]:
    """The size of the video that frames are written to: even, since yuv420p shares colour between 2x2 pixels."""
    return height + height % 2, width + width % 2


def _even(pixels: np.ndarray) -> np.ndarray:
    height, width, _ = pixels.shape
    return np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def picture(pixels: UInt8[np.ndarray, "H W 3"], number: int) -> av.VideoFrame:
    """A frame as H.264 takes it."""
    frame = av.VideoFrame.from_ndarray(_even(pixels), format="rgb24")
    frame.pts = number
    return frame.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED)


def encoded(video, frame: av.VideoFrame, path: pathlib.Path) -> list:
    try:
        return video.encode(frame)
    except av.error.ExternalError as fault:  # x264 refuses
        raise InputError(f"{path}: H.264 takes no video of {frame.width}x{frame.height}") from fault


def _options(crf: int) -> dict[str, str]:
    # x264's macroblock tree reads memory that nobody wrote where the width is no multiple of 128: the same frames
    # become another file each time, 2 of 255 apart. Without it files are a quarter to two fifths larger.
    return {"crf": str(crf), "preset": "medium", "x264-params": "mbtree=0"}


def add_video(container, shape: tuple[int, ...], fps: int, crf: int):
    """An H.264 track for frames of this shape."""
    stream = container.add_stream("libx264", rate=fps, options=_options(crf))
    stream.height, stream.width = written_size(*shape[:2])
    stream.pix_fmt = "yuv420p"
    stream.time_base = Fraction(1, fps)
    _tag(stream.codec_context)
    return stream


def picture_encoder(stream, crf: int) -> av.CodecContext:
    """An encoder of its own for some of a track's frames: what it makes does not depend on those before."""
    like, encoder = stream.codec_context, av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = like.width, like.height, like.pix_fmt
    encoder.time_base, encoder.framerate, encoder.options = like.time_base, like.framerate, _options(crf)
    encoder.flags = like.flags
    _tag(encoder)
    return encoder


def _tag(context) -> None:
    # untagged video is read as BT.601 by some players and BT.709 by others
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = _LIMITED


def _channels(audio: np.ndarray | SoundTrack) -> int:
    return 1 if audio.ndim == 1 else audio.shape[1]


def add_sound(container, audio: np.ndarray | SoundTrack, sample_rate: int):
    """An AAC track for samples of the shape of `audio`."""
    stream = container.add_stream("aac", rate=sample_rate)
    stream.layout = "mono" if _channels(audio) == 1 else "stereo"
    return stream


def mux_sound(container, sound, audio: np.ndarray | SoundTrack, start: int, stop: int) -> int:
    """Encodes samples [start, stop); returns where to go on."""
    stop = min(stop, len(audio))
    if stop <= start:
        return start
    samples = audio[start:stop].reshape(stop - start, -1)
    planar = np.ascontiguousarray(np.clip(samples, -1, 1).T, dtype=np.float32)
    frame = av.AudioFrame.from_ndarray(planar, format="fltp", layout=sound.layout.name)
    frame.sample_rate, frame.pts, frame.time_base = sound.rate, start, Fraction(1, sound.rate)
    container.mux(sound.encode(frame))
    return stop
