"""What the denoiser is told of a long video: window by window, with audio tokens made where a window asks for them."""

import contextlib
import dataclasses
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mi_jax.conditions import Conditions
from mi_jax.data.samples import mono, samples_from
from mi_jax.data.utterances import Utterances
from mi_jax.errors import InputError
from mi_jax.mesh import off_mesh
from mi_jax.models.audio_encoder import FRAMES as VIDEO_FRAMES
from mi_jax.models.audio_encoder import audio_steps
from mi_jax.models.hidden_states import RunningStates
from mi_jax.rates import FPS, SAMPLE_RATE

READ_AHEAD = 30 * SAMPLE_RATE
"""Samples of a sound that is still arriving which are taken before they are needed."""


@runtime_checkable
class Voice(Protocol):
    """A speaker's wav2vec2 states, two for each video frame (`models.hidden_states.HiddenStates`)."""

    def read(self, start: int, stop: int) -> Float[np.ndarray, "n l d"]:
        """Steps `start` .. `stop - 1`; those that are not of the voice are zero."""
        ...


@dataclasses.dataclass(frozen=True)
class Listening:
    """Conditions of a video of known length, `stream.Arriving`: memory does not grow with the video.

    fixed: all that is not heard, of the whole video; each with the latent frame from which on it holds, the first 0.
    voices: one for each face mask.
    encode: audio tokens [s t a e] of steps [s n l d], and whether they begin the video.
    """

    fixed: Sequence[tuple[int, Conditions]]
    voices: Sequence[Voice]
    encode: Callable[[np.ndarray, bool], np.ndarray]
    latent_frames: int

    def known(self, frames: int | None = None) -> tuple[int, bool]:
        return self.latent_frames, True

    def window(self, start: int, length: int) -> Conditions:
        """Beyond the end no sound is known, and a face mask that moves stays where it is."""
        told = in_force(self.fixed, start, length)
        if not self.voices:
            return told
        steps = audio_steps(start, length)
        with off_mesh():
            heard = np.stack([voice.read(steps.start, steps.stop) for voice in self.voices])
        tokens = self.encode(heard, start == 0)
        return dataclasses.replace(told, audio=jnp.asarray(tokens)[None])


def in_force(fixed: Sequence[tuple[int, Conditions]], start: int, length: int) -> Conditions:
    """Those that hold in the middle of a window, cut to it. Beyond the end, a face mask that moves stays as it was."""
    held = [conditions for first, conditions in fixed if first <= start + length // 2][-1]
    told = held.window(start, length)
    if held.face_mask is not None and held.face_mask.ndim == 5:
        total = held.face_mask.shape[2]
        if start + length > total:  # what was cut is the last frames
            frames = np.minimum(start + np.arange(length), total - 1) - max(0, total - length)
            told = dataclasses.replace(told, face_mask=jnp.asarray(np.asarray(told.face_mask)[:, :, frames]))
    return told


class LiveSound:
    """Samples of a voice that come one piece after the other: from a microphone, a socket, a generator.

    A thread of its own takes them, so that what has arrived by now can be asked for.

    pieces: arrays at 16 kHz of any kind that `samples_from` takes. stall: seconds without a piece after which the
    source is given up.
    """

    def __init__(self, pieces: Iterable[Any], name: str, stall: float = 60.0):
        self.name, self.stall = name, stall
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=64)  # a source that is faster waits
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._take, args=(iter(pieces),), name=name, daemon=True)
        self._thread.start()

    def _take(self, pieces: Iterator[Any]) -> None:
        try:
            for piece in pieces:
                if self._closed.is_set():
                    return
                if np.size(piece):  # microphones give empty ones, too
                    self._put(np.array(mono(samples_from(piece, self.name))))  # and fill the same memory again
            self._put(None)
        except BaseException as fault:  # whatever the source raises is the reader's to see
            self._put(fault)

    def _put(self, piece: Any) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(piece, timeout=0.2)
                return

    def close(self) -> None:
        """No more is taken from the source."""
        self._closed.set()

    def next(self, wait: bool) -> np.ndarray | Literal["nothing"] | None:
        """The next piece; None: the sound has ended; "nothing": none has come yet, and it was not to be waited for.

        Raises:
          InputError: nothing came for too long, or what came are no samples. What the source raises.
        """
        try:
            piece = self._queue.get(timeout=self.stall) if wait else self._queue.get_nowait()
        except queue.Empty:
            if not wait:
                return "nothing"
            raise InputError(f"{self.name}: no sound has come for {self.stall:g} s") from None
        if isinstance(piece, BaseException):
            raise piece
        return piece


def pieces_of(voice: Any) -> Iterator[Any]:
    """A voice as one that arrives."""
    if isinstance(voice, Iterator):
        return voice
    if not isinstance(voice, Utterances):
        return iter([voice])
    ends = (0, *(start + len(said) for start, said in voice))
    return (part for end, (start, said) in zip(ends, voice) for part in (np.zeros(start - end, np.float32), said))


class LiveListening:
    """Conditions of a video whose voices are still arriving, `stream.Arriving`. The video ends with the longest.

    fixed, encode: see `Listening`. voices: the states of each, and where its sound comes from. seconds: at most so
    long. lead_in: video frames before the first one shown.
    """

    def __init__(
        self,
        fixed: Sequence[tuple[int, Conditions]],
        voices: Sequence[tuple[RunningStates, LiveSound]],
        encode: Callable[[np.ndarray, bool], np.ndarray],
        *,
        seconds: float | None = None,
        lead_in: int = 0,
    ):
        self.fixed, self.voices, self.encode, self.lead_in = fixed, voices, encode, lead_in
        self.most = None if seconds is None else round(max(seconds, 1 / FPS) * SAMPLE_RATE)
        for _, sound in voices:  # nobody reads it any more, and its thread keeps it alive
            weakref.finalize(self, sound.close)

    @property
    def video_frames(self) -> int | None:
        """That are shown; None: the voices have not ended."""
        if not all(states.ended for states, _ in self.voices):
            return None
        return max(1, round(max(states.num_samples for states, _ in self.voices) / SAMPLE_RATE * FPS))

    def known(self, frames: int | None = None) -> tuple[int, bool]:
        if frames is None:
            for states, sound in self.voices:
                while states.waiting < READ_AHEAD and self._hear(states, sound, wait=False):
                    pass
        else:
            for states, sound in self.voices:
                while not states.ended and self._heard(states) < frames:
                    self._hear(states, sound, wait=True)
        if self.video_frames is not None:
            return -(-(self.lead_in + self.video_frames - 1) // VIDEO_FRAMES) + 1, True
        return min(self._heard(states) for states, _ in self.voices if not states.ended), False

    def window(self, start: int, length: int) -> Conditions:
        """Beyond the end of a voice no sound is known."""
        steps = audio_steps(start, length)
        with off_mesh():
            heard = np.stack([states.read(steps.start, steps.stop) for states, _ in self.voices])
        tokens = self.encode(heard, start == 0)
        return dataclasses.replace(in_force(self.fixed, start, length), audio=jnp.asarray(tokens)[None])

    def _hear(self, states: RunningStates, sound: LiveSound, wait: bool) -> bool:
        """Takes the next piece; whether there was one."""
        if states.ended:
            return False
        piece = sound.next(wait)
        if isinstance(piece, str):
            return False
        if piece is not None:
            states.feed(piece if self.most is None else piece[: max(0, self.most - states.num_samples)])
        states.ended = piece is None or (self.most is not None and states.num_samples >= self.most)
        if states.ended:
            sound.close()
            if not states.num_samples:
                raise InputError(f"{sound.name}: ended without a single sample")
        return True

    @staticmethod
    def _heard(states: RunningStates) -> int:
        """Latent frames all of whose steps can be read."""
        return max(0, (states.num_steps + 2) // (2 * VIDEO_FRAMES))
