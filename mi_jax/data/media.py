"""Pictures, sound and video in and out of files: Pillow for pictures, PyAV (no ffmpeg binary) for the rest.

Every fault of a file is an `InputError` of one line that names the file and what is wrong with it. Files are written
beside their final name and renamed when whole, so a reader never meets half a video.
"""

import contextlib
import pathlib
import warnings
import wave
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import numpy as np
import soxr
from jaxtyping import Bool, Float32, UInt8
from PIL import Image, ImageOps

from mi_jax.errors import InputError
from mi_jax.files import PathLike, check_writable, existing_file, reason, written_beside
from mi_jax.rates import FPS, SAMPLE_RATE

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv")  # containers that hold H.264 and AAC
MIN_SIDE = 16  # pixels: below this no face can be told from noise
MAX_PIXELS = 80_000_000  # below Pillow's own warning line; a 30,000 x 30,000 picture would need 2.7 GB
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


def check_video_path(path: PathLike) -> pathlib.Path:
    """As `check_writable`, for a video: the suffix must name a container for H.264 and AAC."""
    path = pathlib.Path(path)
    if path.suffix.lower() not in VIDEO_SUFFIXES:
        raise InputError(f"{path}: the name of a video must end in one of {', '.join(VIDEO_SUFFIXES)}")
    return check_writable(path)


# Pictures


def read_image(path: PathLike) -> UInt8[np.ndarray, "H W 3"]:
    """A picture file as RGB: upright by its EXIF rotation, transparency on white, any colour mode, first of several.

    Raises InputError: missing, not a picture, damaged, a side under 16 px, or over 80 million pixels (by its header).
    """
    with _opened_image(path, "picture") as image:
        return rgb_from_image(image)


def read_mask(path: PathLike) -> Bool[np.ndarray, "H W"]:
    """A mask picture: True where lighter than mid-grey; transparent counts as black. Raises as `read_image` does."""
    with _opened_image(path, "mask") as image:
        image = _eight_bits(ImageOps.exif_transpose(image)).convert("RGBA")
        return np.array(Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("L")) >= 128


@contextlib.contextmanager
def _opened_image(path: PathLike, what: str) -> Iterator[Image.Image]:
    """An image whose header was found good. Faults in here, and in decoding inside the block, become InputError."""
    path = existing_file(path, what)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=IMAGE_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise InputError(f"{path}: {what} of {width}x{height} is too large (at most {MAX_PIXELS:,} pixels)")
                if min(width, height) < MIN_SIDE:
                    raise InputError(f"{path}: {what} of {width}x{height} is too small (at least {MIN_SIDE} px a side)")
                yield image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as fault:
        raise InputError(f"{path}: {what} is too large (at most {MAX_PIXELS:,} pixels)") from fault
    except Image.UnidentifiedImageError as fault:
        raise InputError(f"{path}: {what} cannot be read (known formats: {', '.join(IMAGE_FORMATS)})") from fault
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError) as fault:  # what Pillow's decoders raise on damaged data
        raise InputError(f"{path}: damaged {what} ({reason(fault)})") from fault


def rgb_from_image(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    """A PIL image as RGB pixels: EXIF rotation applied, transparency composited on white, 16 bits scaled to 8."""
    image = _eight_bits(ImageOps.exif_transpose(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.array(image.convert("RGB"))


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits: Pillow's own conversion clips it at 255."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))


def fit_image(image: UInt8[np.ndarray, "H W 3"], height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """The centre of `image`, as large as the new aspect allows, resampled (Lanczos) to height x width."""
    fitted = ImageOps.fit(Image.fromarray(image), (width, height), Image.Resampling.LANCZOS)
    return np.array(fitted)


def fit_mask(mask: Bool[np.ndarray, "H W"], height: int, width: int) -> Bool[np.ndarray, "h w"]:
    """What `fit_image` keeps of a mask of the picture's size: areas are averaged, one half and more is True."""
    fitted = ImageOps.fit(Image.fromarray(mask.astype(np.uint8) * 255), (width, height), Image.Resampling.BOX)
    return np.array(fitted) >= 128


def write_image(path: PathLike, image: UInt8[np.ndarray, "H W ..."]) -> None:
    """Writes a picture (grey or RGB; the suffix names the format). Raises InputError where it cannot be written."""
    with written_beside(path) as partial:
        Image.fromarray(image).save(partial)


# Sound


def read_audio(path: PathLike, sample_rate: int = SAMPLE_RATE) -> Float32[np.ndarray, " n"]:
    """The first sound track of any file FFmpeg reads: mono (mean of the channels) at `sample_rate`, about [-1, 1].

    Raises InputError: missing, unreadable or damaged, without a sound track, without a sample, non-finite samples.
    """
    path = existing_file(path, "audio")
    chunks: list[np.ndarray] = []
    resampler = None
    try:
        # "file:" keeps FFmpeg from reading a colon in the name as a protocol
        with av.open(f"file:{path}") as container:
            if not container.streams.audio:
                raise InputError(f"{path}: holds no sound")
            stream = container.streams.audio[0]
            left = _stated_seconds(container, stream)
            to_float = av.AudioResampler(format="fltp")
            for frame in container.decode(stream):
                for planar in to_float.resample(frame):
                    mono = planar.to_ndarray().mean(axis=0, dtype=np.float32)
                    mono = mono[: max(0, round(left * planar.sample_rate))] if left < np.inf else mono
                    left -= len(mono) / planar.sample_rate
                    if not np.isfinite(mono).all():
                        raise InputError(f"{path}: sound holds samples that are not numbers (NaN or infinite)")
                    if resampler is None:
                        resampler = soxr.ResampleStream(planar.sample_rate, sample_rate, 1, dtype="float32")
                    chunks.append(resampler.resample_chunk(mono))
    except av.error.FFmpegError as fault:
        raise InputError(f"{path}: not a sound file that can be read ({reason(fault)})") from fault
    if resampler is not None:
        chunks.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    samples = np.concatenate(chunks) if chunks else np.zeros(0, np.float32)
    if samples.size == 0:
        raise InputError(f"{path}: sound without a single sample")
    return samples


def _stated_seconds(container, stream) -> float:
    """The length that an MP4 or MOV states: its AAC decodes to whole blocks, past its end. Others guess."""
    if "mp4" in container.format.name and stream.duration:
        return float(stream.duration * stream.time_base)
    return np.inf


def write_audio(path: PathLike, audio: Float32[np.ndarray, " n"], sample_rate: int = SAMPLE_RATE) -> None:
    """Writes mono samples in [-1, 1] as a 16-bit WAV file. Raises InputError where it cannot be written."""
    with written_beside(path) as partial, wave.open(str(partial), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes((np.clip(audio, -1, 1) * 32767).round().astype("<i2").tobytes())


# Video


def read_video(path: PathLike) -> tuple[UInt8[np.ndarray, "f H W 3"], float]:
    """All frames of the first video track as RGB, upright by its rotation tag, and its frames per second.

    Raises InputError: missing, unreadable or damaged, or without a frame.
    """
    path = existing_file(path, "video")
    try:
        with av.open(f"file:{path}") as container:
            if not container.streams.video:
                raise InputError(f"{path}: holds no picture track")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or FPS)
            frames = [_upright(frame) for frame in container.decode(stream)]
    except av.error.FFmpegError as fault:
        raise InputError(f"{path}: not a video that can be read ({reason(fault)})") from fault
    if not frames:
        raise InputError(f"{path}: video without a single frame")
    return np.stack(frames), rate


def _upright(frame: av.VideoFrame) -> np.ndarray:
    pixels = frame.to_ndarray(format="rgb24")
    return np.rot90(pixels, k=round(frame.rotation / 90)) if frame.rotation else pixels


def write_video(
    path: PathLike,
    frames: UInt8[np.ndarray, "f H W 3"] | Iterable[np.ndarray],
    audio: Float32[np.ndarray, " n"] | Float32[np.ndarray, "n c"] | None = None,
    *,
    fps: int = FPS,
    sample_rate: int = SAMPLE_RATE,
    crf: int = 16,
) -> None:
    """Writes H.264 (yuv420p, BT.709) and, where `audio` is given, AAC.

    Args:
      path: ends in .mp4, .m4v, .mov or .mkv; its folder exists.
      frames: an array or an iterator of uint8 RGB frames of one size; odd sizes grow by one repeated row or column,
        since yuv420p shares colour between 2x2 pixels.
      audio: samples in [-1, 1] (clipped there), mono or one or two channels last.
      crf: x264's constant quality; lower is better and larger.

    Raises: InputError where the file cannot be written; ValueError for no frame, or audio that is not finite.
    """
    path = check_video_path(path)
    if audio is not None:
        audio = audio[:, None] if audio.ndim == 1 else audio
        if audio.shape[1] not in (1, 2):
            raise ValueError(f"audio has {audio.shape[1]} channels, 1 or 2 can be written")
        if not np.isfinite(audio).all():
            raise ValueError("audio holds samples that are not finite")
    with written_beside(path) as partial, av.open(f"file:{partial}", "w", options=_muxer_options(path)) as container:
        video, sound, written = None, None, 0
        for index, pixels in enumerate(frames):
            if video is None:
                video = _add_video(container, pixels.shape, fps, crf)
                sound = None if audio is None else _add_sound(container, audio, sample_rate)
            frame = av.VideoFrame.from_ndarray(_even(pixels), format="rgb24")
            frame.pts = index
            frame = frame.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED)
            container.mux(video.encode(frame))
            if sound is not None:  # the sound under this frame follows it: neither track waits in memory
                until = (index + 1) * sample_rate // fps
                written = _mux_sound(container, sound, audio, written, until)
        if video is None:
            raise ValueError(f"{path}: no frame to write")
        container.mux(video.encode(None))
        if sound is not None:
            _mux_sound(container, sound, audio, written, len(audio))
            container.mux(sound.encode(None))


_BT709 = 1  # the same number in FFmpeg's matrix, primaries and transfer lists (ITU-T H.273)
_LIMITED = 1  # AVCOL_RANGE_MPEG


def _muxer_options(path: pathlib.Path) -> dict[str, str]:
    return {} if path.suffix.lower() == ".mkv" else {"movflags": "+faststart"}


def _even(pixels: np.ndarray) -> np.ndarray:
    height, width, _ = pixels.shape
    return np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _add_video(container, shape: tuple[int, ...], fps: int, crf: int):
    height, width, _ = shape
    stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "preset": "medium"})
    stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
    stream.time_base = Fraction(1, fps)
    # untagged video is read as BT.601 by some players and BT.709 by others
    context = stream.codec_context
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = _LIMITED
    return stream


def _add_sound(container, audio: np.ndarray, sample_rate: int):
    stream = container.add_stream("aac", rate=sample_rate)
    stream.layout = "mono" if audio.shape[1] == 1 else "stereo"
    return stream


def _mux_sound(container, sound, audio: np.ndarray, start: int, stop: int) -> int:
    """Encodes samples [start, stop); returns where to go on."""
    stop = min(stop, len(audio))
    if stop <= start:
        return start
    planar = np.ascontiguousarray(np.clip(audio[start:stop], -1, 1).T, dtype=np.float32)
    frame = av.AudioFrame.from_ndarray(planar, format="fltp", layout=sound.layout.name)
    frame.sample_rate, frame.pts, frame.time_base = sound.rate, start, Fraction(1, sound.rate)
    container.mux(sound.encode(frame))
    return stop
