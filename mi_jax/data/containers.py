"""Files that FFmpeg reads: opened whatever their tags say, and decoded whatever is damaged in them."""

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Iterator

import av

from mi_jax.errors import InputError
from mi_jax.files import reason

MAX_BREAKS = 20
"""Faults of a file's structure (not of single packets) behind which reading goes on."""

_ANY_TAGS = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
"""Tags may be in any encoding. PyAV 19 has no such option: it takes all of them as they are."""

log = logging.getLogger("mi_jax")


@contextlib.contextmanager
def opened(path: pathlib.Path, what: str) -> Iterator[av.container.InputContainer]:
    """A container to read from. FFmpeg's faults in here, and in the block, become InputError: not `what`."""
    try:
        # "file:" keeps FFmpeg from reading a colon in the name as a protocol
        with av.open(f"file:{path}", **_ANY_TAGS) as container:
            yield container
    except av.error.FFmpegError as fault:
        raise InputError(f"{path}: not {what} that can be read ({reason(fault)})") from fault


@dataclasses.dataclass
class Losses:
    """What of a track could not be decoded: seconds, and the first reason (None: nothing is lost)."""

    seconds: float = 0.0
    fault: Exception | None = None

    def add(self, seconds: float, fault: Exception) -> None:
        self.seconds += seconds
        self.fault = self.fault or fault

    def warn(self, path: pathlib.Path) -> None:
        """Says it in one line, if there is anything to say."""
        if self.fault is not None:
            seconds = round(self.seconds, 1 if self.seconds >= 0.1 else 3)
            log.warning("%s: %s s could not be decoded, skipped", path, seconds)


def decoded(container, stream, losses: Losses) -> Iterator[av.AudioFrame | av.VideoFrame]:
    """The frames of a track; packets that cannot be decoded are left out and added to `losses`."""
    packets = container.demux(stream)
    breaks = 0
    while True:
        try:
            packet = next(packets, None)
        except av.error.FFmpegError as fault:
            losses.add(0.0, fault)
            breaks += 1
            if breaks > MAX_BREAKS:
                return
            packets = container.demux(stream)  # an iterator that raised is at its end, the file may not be
            continue
        except IndexError:  # PyAV's, at each packet of a track that the file's start does not announce
            packets = container.demux(stream)
            continue
        if packet is None:
            return
        try:
            frames = packet.decode()
        except av.error.FFmpegError as fault:
            if packet.size:  # the last packet, of size 0, only empties the decoder
                losses.add(float((packet.duration or 0) * packet.time_base), fault)
            continue
        yield from frames


def track(path: pathlib.Path, container, kind: str, what: str):
    """The track that FFmpeg takes by default: marked so by the file, else that of most channels or pixels.

    Raises InputError: there is none (holds no `what`), or none that can be decoded.
    """
    streams = [stream for stream in container.streams if stream.type == kind]
    if not streams:
        raise InputError(f"{path}: holds no {what}")
    readable = [stream for stream in streams if stream.codec_context is not None]
    if not readable:
        raise InputError(f"{path}: its {what} is encoded in a way that FFmpeg cannot decode")
    best = container.streams.best(kind)
    return best if best is not None and best.codec_context is not None else readable[0]
