"""Sound in and out of files, by PyAV (no ffmpeg binary), soxr and the standard library's wave.

Every fault of a file is an `InputError` of one line that names it. What is odd but readable is logged to `mi_jax`.
"""

import dataclasses
import functools
import logging
import pathlib
import shutil
import wave
from collections.abc import Iterator

import av
import numpy as np
import soxr
from jaxtyping import Float32

from mi_jax.data import spool as spools
from mi_jax.data.containers import Losses, decoded, opened, track
from mi_jax.data.pieces import peak, pieces
from mi_jax.data.sound import SILENT_DB, lost_in_mix
from mi_jax.errors import InputError
from mi_jax.files import PathLike, existing_file, written_beside
from mi_jax.memory import available_bytes
from mi_jax.rates import FPS, SAMPLE_RATE

MAX_SECONDS = 6 * 3600
"""The longest sound that is read whole: 1.4 GB on the disk at 16 kHz."""
MAX_CHANNELS = 64
"""FFmpeg's resampler takes no more."""
TIMED = {"mov", "matroska", "webm", "ogg", "mpegts", "mpeg", "flv", "asf"}
"""Formats (FFmpeg's names) that store when each packet is heard. For others FFmpeg counts packets."""
SPLICED = {"ogg", "mpegts", "mpeg"}
"""Of these, those whose clock may jump where two recordings were put together."""
JUMP = 10.0
"""Seconds from which FFmpeg, too, takes a gap in those for a jump of the clock; elsewhere one beyond the file's end."""
JITTER = 1 / FPS
"""Seconds by which stored times may be off before they are believed: Matroska rounds to milliseconds, others worse."""

log = logging.getLogger("mi_jax")


def read_audio(
    path: PathLike, sample_rate: int = SAMPLE_RATE, *, stereo: bool = False, seconds: float | None = None
) -> Float32[np.ndarray, " n"] | Float32[np.ndarray, "n 2"]:
    """The sound of any file FFmpeg reads, at `sample_rate`, about [-1, 1].

    - Of several tracks the one that FFmpeg takes (`containers.track`); the others are named in the log.
    - Mono is the mean of two channels. More are mixed by their places, with the weights of FFmpeg: the centre, where
      voices are, keeps its level; left and right count 0.71, those behind 0.5. Where the sum exceeds full scale, all of
      it is scaled down. Channels without places are averaged. A voice that cancels itself out in the mix (one channel
      turned upside down) is taken from its loudest channel, and that is said.
    - Time 0 is where the file starts, its video too. A track that starts later, or has a gap, is silent there.
    - What cannot be decoded is skipped (its time stays), and said.
    - Beyond `spool.IN_MEMORY` bytes samples lie in an unnamed file of the temporary folder, not in memory: the array is
      then a `numpy.memmap` that can only be read.

    Args:
      stereo: keep two channels where there are two or more: [n 2].
      seconds: of a longer sound only these are read.

    Raises InputError: missing, unreadable, nothing in it can be decoded, without a sound track, without a sample,
      non-finite samples; longer than the free memory or, where it lies there, than the temporary folder has room for;
      without `seconds` also longer than `MAX_SECONDS`.
    """
    path = existing_file(path, "audio")
    with spools.Spool(path) as spool:
        mixer = _read(path, _Mixer(spool, sample_rate, 2 if stereo else 1), seconds)
        lone = None if stereo else lost_in_mix(mixer.power, mixer.mixed_power)
        if lone is not None:
            log.warning(
                "%s: its %d channels cancel each other out; only channel %d is used", path, mixer.widest, lone + 1
            )
            spool.clear()
            mixer = _read(path, _Mixer(spool, sample_rate, 1, only=lone), seconds, quiet=True)
        if len(spool) == 0:
            raise InputError(f"{path}: sound without a single sample")
        if mixer.widest > 2 and (loudest := peak(mixer.samples())) > 1:
            spool.divide(loudest)
        samples = mixer.samples()
    return samples if seconds is None else samples[: round(seconds * sample_rate)]


def _read(path: pathlib.Path, mixer: "_Mixer", seconds: float | None, quiet: bool = False) -> "_Mixer":
    losses = Losses()
    with opened(path, "a sound file") as container:
        stream = track(path, container, "audio", "sound")
        if stream.layout.nb_channels > MAX_CHANNELS:
            raise InputError(f"{path}: sound of {stream.layout.nb_channels} channels (at most {MAX_CHANNELS})")
        _check_length(path, _stated_seconds(container, stream), mixer, seconds)
        for samples, layout, rate in _pieces(container, stream, losses):
            if not np.isfinite(samples).all():
                raise InputError(f"{path}: sound holds samples that are not numbers (NaN or infinite)")
            mixer.add(samples, layout, rate)
            if seconds is not None and mixer.seconds >= seconds:
                break
            if seconds is None and mixer.seconds > MAX_SECONDS:
                raise InputError(_too_long(path, mixer.seconds))
        mixer.finish()
        if not mixer.widest and losses.fault is not None:
            raise losses.fault
        if not quiet:
            losses.warn(path)
            _name_tracks(path, container, stream, mixer)
    return mixer


def _check_length(path: pathlib.Path, stated: float, mixer: "_Mixer", seconds: float | None) -> None:
    if seconds is None and stated > MAX_SECONDS:
        raise InputError(_too_long(path, stated))
    length = stated if seconds is None else min(seconds, stated)
    size = length * mixer.rate * mixer.channels * 4
    wanted = [(min(size, spools.IN_MEMORY), available_bytes(), "memory")]
    if size > spools.IN_MEMORY:
        folder = spools.temporary_folder(path)
        wanted.append((size, shutil.disk_usage(folder).free, f"the temporary folder {folder} (TMPDIR names another)"))
    for needed, free, place in wanted:
        if free is not None and needed > free:
            raise InputError(
                f"{path}: {length / 3600:.1f} hours of sound take {needed / 1e9:.2f} GB of {place}, "
                f"{free / 1e9:.2f} GB are free"
            )


def _too_long(path: pathlib.Path, seconds: float) -> str:
    return (
        f"{path}: sound of {seconds / 3600:.1f} hours is too long (at most {MAX_SECONDS // 3600}); "
        "say how many seconds of it are wanted, or cut it"
    )


def _stated_seconds(container, stream) -> float:
    """The length that the file's header states, or FFmpeg estimates; 0 where there is none."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base


def _name_tracks(path: pathlib.Path, container, stream, mixer: "_Mixer") -> None:
    """One line about a file of several sound tracks: which is read, and whether it is the one that was meant."""
    tracks = list(container.streams.audio)
    if len(tracks) < 2:
        return
    described = {}
    for number, other in enumerate(tracks, 1):
        context = other.codec_context
        words = [context.name, context.layout.name] if context is not None else ["unknown"]
        tags = [other.metadata.get(key) for key in ("language", "title")]
        described[other.index] = f"{number} ({', '.join([*words, *(tag for tag in tags if tag and tag != 'und')])})"
    read = described.pop(stream.index)
    silent = peak(mixer.samples()) < 10 ** (SILENT_DB / 20)
    log.log(
        logging.WARNING if silent else logging.INFO,
        "%s: %d sound tracks; read is %s%s, not read: %s",
        path, len(tracks), read, ", which is silent" if silent else "", "; ".join(described.values()),
    )  # fmt: skip


def _pieces(container, stream, losses: Losses) -> Iterator[tuple[np.ndarray, str, int]]:
    """A track in pieces ([n c] f32, layout, rate), without holes: there is silence where its times leave a gap."""
    names = set(container.format.name.split(","))
    start, length = ((seconds or 0) / av.time_base for seconds in (container.start_time, container.duration))
    clock = Clock(max(0.0, start), length, timed=bool(TIMED & names), spliced=bool(SPLICED & names))
    end = np.inf
    if "mov" in names and stream.duration:  # its AAC decodes to whole blocks, past its end
        end = float(((stream.start_time or 0) + stream.duration) * stream.time_base) - clock.origin
    resampler, setting, lost = None, None, 0.0
    for frame in decoded(container, stream, losses):
        rate, layout, channels = frame.sample_rate, frame.layout.name, frame.layout.nb_channels
        stated = None if frame.pts is None else float(frame.pts * frame.time_base)
        silent = round(clock.silence_before(stated, losses.seconds - lost) * rate)
        lost = losses.seconds
        for first in range(0, silent, rate):
            yield np.zeros((min(rate, silent - first), channels), np.float32), layout, rate
        clock.advance(silent / rate)
        if setting != (frame.format.name, layout, rate):
            setting = (frame.format.name, layout, rate)
            # packed samples: planes of more than 8 channels lie where PyAV does not look
            resampler = av.AudioResampler(format="flt")
        frame.pts = None
        for packed in resampler.resample(frame):
            samples = packed.to_ndarray().reshape(-1, channels)
            if end < np.inf:
                samples = samples[: max(0, round((end - clock.position) * rate))]
            yield samples, layout, rate
            clock.advance(len(samples) / rate)


@dataclasses.dataclass
class Clock:
    """How much silence belongs before each frame of a track, by the times that its file states.

    origin: what the file calls its start. length: of the file, in seconds; 0 where that is not known. timed, spliced:
    see `TIMED`, `SPLICED`. position: seconds that were heard so far.
    """

    origin: float
    length: float
    timed: bool
    spliced: bool
    position: float = 0.0
    heard: bool = False

    def silence_before(self, stated: float | None, lost: float) -> float:
        """Seconds before a frame of this time (None: unknown), `lost` of which could not be decoded."""
        if not self.timed or stated is None:
            return lost if self.heard else 0.0
        gap = stated - self.origin - self.position
        jumps = gap > JUMP and (self.spliced or self.position + gap > self.length)
        if jumps or (self.heard and gap < -JITTER):
            self.origin += gap
            return 0.0
        believed = gap >= JITTER or lost > 0 or not self.heard
        return max(0.0, gap) if believed else 0.0

    def advance(self, seconds: float) -> None:
        self.position += seconds
        self.heard = True


class _Mixer:
    """Brings pieces of any layout and rate to `channels` (1 or 2) and one rate, and measures what the mix loses."""

    def __init__(self, spool: spools.Spool, rate: int, channels: int, only: int | None = None):
        self.spool, self.rate, self.channels, self.only = spool, rate, channels, only
        self.power, self.mixed_power = np.zeros(0), 0.0  # of each channel, and of the mix: sums over all samples
        self.widest = 0  # channels, at most
        self._resampler, self._from = None, None

    @property
    def seconds(self) -> float:
        return len(self.spool) / (self.channels * self.rate)

    def add(self, samples: Float32[np.ndarray, "n c"], layout: str, rate: int) -> None:
        channels = samples.shape[1]
        self.widest = max(self.widest, channels)
        if self.only is None:
            mixed = mix_down(samples, layout, self.channels)
        else:
            mixed = samples[:, [min(self.only, channels - 1)]]
        if self.channels == 1 and channels > 1:
            self.power = np.pad(self.power, (0, self.widest - len(self.power)))
            self.power[:channels] += np.square(samples).sum(axis=0, dtype=np.float64)
            self.mixed_power += np.square(mixed).sum(dtype=np.float64)
        if self._from != rate:
            self.finish()
            self._from = rate
            self._resampler = soxr.ResampleStream(rate, self.rate, self.channels, dtype="float32")
        self._append(mixed)

    def finish(self) -> None:
        """What the resampler still holds."""
        if self._resampler is not None:
            self._append(np.zeros((0, self.channels), np.float32), last=True)
            self._resampler, self._from = None, None

    def samples(self) -> np.ndarray:
        """[n], or [n 2] where two channels were wanted and any piece had them."""
        samples = self.spool.array().reshape(-1, self.channels)
        return samples[:, 0] if self.channels == 1 or self.widest < 2 else samples

    def _append(self, mixed: np.ndarray, last: bool = False) -> None:
        chunk = mixed[:, 0] if self.channels == 1 else mixed
        self.spool.append(self._resampler.resample_chunk(np.ascontiguousarray(chunk), last=last))


def mix_down(samples: Float32[np.ndarray, "n c"], layout: str, channels: int) -> Float32[np.ndarray, "n {channels}"]:
    """Samples of one of FFmpeg's layouts ("5.1") as one channel or two; see `read_audio`."""
    if samples.shape[1] == channels:
        return samples
    weights = None if samples.shape[1] <= 2 else mix_weights(layout, channels)
    if weights is None:
        return np.repeat(samples.mean(axis=1, dtype=np.float32, keepdims=True), channels, axis=1)
    return samples @ weights


@functools.lru_cache(maxsize=64)
def mix_weights(layout: str, channels: int) -> Float32[np.ndarray, "c {channels}"] | None:
    """FFmpeg's weights for a layout's channels in mono or stereo; None where the layout names no places."""
    if layout.endswith(" channels") or layout.startswith("ambisonic"):
        return None
    try:
        count = av.AudioLayout(layout).nb_channels
        impulses = av.AudioFrame.from_ndarray(np.eye(count, dtype=np.float32).reshape(1, -1), "flt", layout)
        impulses.sample_rate = SAMPLE_RATE
        (mixed,) = av.AudioResampler("flt", ["mono", "stereo"][channels - 1]).resample(impulses)
    except (av.error.FFmpegError, ValueError):
        return None
    return mixed.to_ndarray().reshape(count, channels)


def write_audio(path: PathLike, audio: Float32[np.ndarray, " n"], sample_rate: int = SAMPLE_RATE) -> None:
    """Writes mono samples in [-1, 1] as a 16-bit WAV file. Raises InputError where it cannot be written."""
    with written_beside(path) as partial, wave.open(str(partial), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        for part in pieces(len(audio)):
            file.writeframes((np.clip(audio[part], -1, 1) * 32767).round().astype("<i2").tobytes())
