"""A video that is written while it is made: it can be watched meanwhile, and gone on with after the writer was killed.

Beside `out.mp4` there is a folder `out.mp4.partial` until the video is whole. It holds `video`, a fragmented mp4 (or
mkv) that players open while it grows, and the states from which its maker can go on. A segment ends where a state is
kept: each is encoded for itself, so that a video that was gone on with has the same frames as one that was not.
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import av
import numpy as np
from jaxtyping import UInt8

from mi_jax.data import video_files
from mi_jax.data.pieces import PIECE
from mi_jax.data.sound_track import SoundTrack
from mi_jax.errors import InputError
from mi_jax.files import PathLike, disk_faults_named, locked, reason, written_beside
from mi_jax.rates import FPS, SAMPLE_RATE

SEGMENT = 250
"""Frames after which a segment may end."""
REQUEST = "request.json"
REORDERED = 2
"""How many frames later a frame may be shown than it is decoded: x264's references among its frames between."""


class GrowingVideo:
    """Frames in, in order; a video file at the end. A context manager: what an error leaves is kept where a segment is
    whole, and said; else nothing stays.

    request: what the video is made of, as JSON. A later writer of the same request may go on (`resume`).
    frames: written so far.
    """

    def __init__(
        self,
        path: PathLike,
        height: int,
        width: int,
        audio: np.ndarray | SoundTrack | None = None,
        *,
        request: Mapping[str, Any] | None = None,
        resume: bool = False,
        fps: int = FPS,
        sample_rate: int = SAMPLE_RATE,
        crf: int = 16,
    ):
        self.path = video_files.check_video_path(path)
        self.size, self.audio, self.fps, self.sample_rate, self.crf = (height, width), audio, fps, sample_rate, crf
        self.request = json.loads(json.dumps(request or {}))
        self.folder = self.path.with_name(f"{self.path.name}.partial")
        self.frames, self.marked, self.state = 0, 0, None
        """Frames written, those in whole segments, and the state that was kept with the last of these."""
        self._video, self._heard = None, 0
        self._open(resume)

    def _open(self, resume: bool) -> None:
        left = self.folder / REQUEST
        try:
            there = self.folder.exists()
        except OSError as fault:  # a name that no file can have
            raise InputError(f"{self.path}: cannot be written ({reason(fault)})") from None
        if there and not left.is_file() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise InputError(f"{self.folder}: is there, and no unfinished video; move it away")
        if resume and not left.is_file():
            raise InputError(f"{self.path}: nothing to resume, there is no {self.folder}")
        found = kept_states(self.folder) if left.is_file() else []
        if found and not resume:
            raise InputError(
                f"{self.folder}: holds {found[-1][0] / self.fps:.1f} s of a video that an earlier run did not finish: "
                "--resume goes on with it; or remove the folder"
            )
        if resume:
            before = read_request(left)
            other = sorted(k for k in {*before, *self.request} if before.get(k) != self.request.get(k))
            if other:
                raise InputError(f"{self.folder}: was made with other {', '.join(other)}; resume with the same")
        self._lock = contextlib.ExitStack()
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock.enter_context(locked(self.folder, "a video"))
            if not resume:
                left.write_text(json.dumps(self.request, indent=2))
            whole = self._take_over(found) if resume else False
            for frames, path in kept_states(self.folder):
                if frames > self.marked:
                    path.unlink()
            # What is there is copied to another file, which takes its place when it is whole.
            new = self.folder / f"next{self.path.suffix}"
            self._container = self._new(new)
            if whole:
                self._copy(self._file)
            os.replace(new, self._file)
        except OSError as fault:
            self._lock.close()
            raise InputError(f"{self.folder}: cannot be written ({reason(fault)})") from fault
        except BaseException:
            self._lock.close()
            raise

    def _take_over(self, found: list[tuple[int, pathlib.Path]]) -> bool:
        """Takes the newest state whose frames are all in the file; whether there is one."""
        whole = whole_frames(self._file) if self._file.is_file() else 0
        for frames, path in reversed(found):
            if frames <= whole:
                with contextlib.suppress(Exception):  # whatever a damaged file makes numpy raise
                    with np.load(path) as arrays:
                        self.state = dict(arrays)
                    self.frames = self.marked = frames
                    return True
        if found:
            video_files.log.warning("%s: none of what it holds can be gone on with; begun anew", self.folder)
        return False

    @property
    def _file(self) -> pathlib.Path:
        return self.folder / f"video{self.path.suffix}"

    def _new(self, path: pathlib.Path) -> Any:
        """The file that grows, its header written."""
        options = {"flush_packets": "1"}
        if path.suffix.lower() != ".mkv":
            options["movflags"] = "frag_keyframe+empty_moov+default_base_moof"
        container = av.open(f"file:{path}", "w", options=options)
        self._stream = video_files.add_video(container, (*self.size, 3), self.fps, self.crf)
        self._sound = None if self.audio is None else video_files.add_sound(container, self.audio, self.sample_rate)
        container.start_encoding()
        return container

    def _copy(self, before: pathlib.Path) -> None:
        """The segments that are whole; the sound is encoded anew."""
        for packet in picture_packets(before, self.fps):
            if packet.pts >= self.marked:
                break
            self._mux_sound(packet.pts + 1)
            packet.stream = self._stream
            self._container.mux(packet)

    def write(self, frames: UInt8[np.ndarray, "n H W 3"]) -> None:
        """Raises InputError: the disk is full; or H.264 takes no such size."""
        with self._faults_told():
            for pixels in frames:
                if self._video is None:
                    self._video = video_files.picture_encoder(self._stream, self.crf)
                self._mux_sound(self.frames + 1)
                frame = video_files.picture(pixels, self.frames)
                self._mux(video_files.encoded(self._video, frame, self.path))
                self.frames += 1

    @property
    def segment_is_long(self) -> bool:
        return self.frames - self.marked >= SEGMENT

    def keep(self, state: Mapping[str, np.ndarray]) -> None:
        """Ends the segment; `state` is where the maker goes on after the frames written so far."""
        with self._faults_told():
            self._end_segment()
            new = self.folder / "new"
            with new.open("wb") as file:
                np.savez(file, **state)
            os.replace(new, self.folder / f"{self.frames}.npz")
            # The last segment's end is on the disk only when the next begins: the state before it is kept, too.
            for frames, path in kept_states(self.folder)[:-2]:
                if frames < self.marked:
                    path.unlink()
            self.marked = self.frames

    def _end_segment(self) -> None:
        if self._video is not None:
            self._mux(self._video.encode(None))
            self._video = None

    def finish(self) -> None:
        """The whole video under its name: the pictures as they are, the sound encoded in one go."""
        with self._faults_told():
            self._end_segment()
            self._container.close()
            self._container = None
            options = {} if self.path.suffix.lower() == ".mkv" else {"movflags": "+faststart"}
            with written_beside(self.path) as partial, av.open(f"file:{partial}", "w", options=options) as out:
                stream = video_files.add_video(out, (*self.size, 3), self.fps, self.crf)
                sound = None if self.audio is None else video_files.add_sound(out, self.audio, self.sample_rate)
                out.start_encoding()
                written, count = 0, 0
                for packet in picture_packets(self._file, self.fps):
                    count += 1
                    if sound is not None:
                        until = (packet.pts + 1) * self.sample_rate // self.fps
                        written = video_files.mux_sound(out, sound, self.audio, written, until)
                    packet.stream = stream
                    out.mux(packet)
                if count < self.frames:
                    raise InputError(f"{self._file}: holds {count} of the {self.frames} frames that were written to it")
                if sound is not None:
                    while written < len(self.audio):
                        written = video_files.mux_sound(out, sound, self.audio, written, written + PIECE)
                    out.mux(sound.encode(None))
        self._leave(remove=True)

    def __enter__(self) -> "GrowingVideo":
        return self

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if self._container is not None:
            with contextlib.suppress(Exception):  # a full disk has no room for the end either
                self._end_segment()
            with contextlib.suppress(Exception):
                self._container.close()
        kept = bool(kept_states(self.folder))
        self._leave(remove=not kept)
        if kept and kind is not None:
            told = f"{self._file} holds what was made so far, {self.marked / self.fps:.1f} s: --resume goes on"
            if isinstance(error, InputError):
                raise InputError(f"{error}; {told}") from error
            video_files.log.warning("%s", told)

    def _leave(self, remove: bool) -> None:
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def _mux(self, packets: list) -> None:
        for packet in packets:
            packet.stream, packet.duration = self._stream, 1
            self._container.mux(packet)

    def _mux_sound(self, frames: int) -> None:
        if self._sound is not None:
            until = frames * self.sample_rate // self.fps
            self._heard = video_files.mux_sound(self._container, self._sound, self.audio, self._heard, until)

    @contextlib.contextmanager
    def _faults_told(self) -> Iterator[None]:
        with disk_faults_named(self.path):
            yield


def kept_states(folder: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    """(frames before it, file) of every state in a folder, in order."""
    return sorted((int(path.stem), path) for path in folder.glob("*.npz") if path.stem.isdigit() and path.is_file())


def read_request(path: pathlib.Path) -> dict[str, Any]:
    """Raises InputError: it is damaged."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a JSONDecodeError or UnicodeDecodeError, too
        said = None
    if not isinstance(said, dict):
        raise InputError(f"{path}: damaged; what it belongs to cannot be gone on with")
    return said


def picture_packets(path: pathlib.Path, fps: int) -> Iterator[Any]:
    """The pictures of a file of `GrowingVideo`'s, still encoded, timed by their number; as far as the file is whole."""
    with contextlib.suppress(av.error.FFmpegError), av.open(f"file:{path}") as container:
        stream, origin, number = container.streams.video[0], None, 0
        # As encoders give them: muxers take no others for a track that an encoder describes.
        plain = av.bitstream.BitStreamFilterContext("h264_mp4toannexb", stream)
        for stored in container.demux(stream):
            for packet in plain.filter(stored) if stored.pts is not None else []:
                origin = packet.pts if origin is None else origin  # the first is the earliest
                pts = round((packet.pts - origin) * packet.time_base * fps)
                packet.time_base = Fraction(1, fps)
                packet.pts, packet.dts, packet.duration = pts, number - REORDERED, 1
                number += 1
                yield packet


def whole_frames(path: pathlib.Path) -> int:
    """How many frames from the first on are in a file that may end anywhere."""
    return sum(1 for _ in picture_packets(path, FPS))
