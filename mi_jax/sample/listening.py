"""What the denoiser is told of a long video: window by window, with audio tokens made where a window asks for them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from mi_jax.conditions import Conditions
from mi_jax.mesh import off_mesh
from mi_jax.models.audio_encoder import audio_steps


@runtime_checkable
class Voice(Protocol):
    """A speaker's wav2vec2 states, two for each video frame (`wav2vec2.HiddenStates`)."""

    def read(self, start: int, stop: int) -> Float[np.ndarray, "n l d"]:
        """Steps `start` .. `stop - 1`; those that are not of the voice are zero."""
        ...


@dataclasses.dataclass(frozen=True)
class Listening:
    """Conditions of a video of known length, `stream.Arriving`: memory does not grow with the video.

    fixed: all that is not heard, of the whole video.
    voices: one for each face mask.
    encode: audio tokens [s t a e] of steps [s n l d], and whether they begin the video.
    """

    fixed: Conditions
    voices: Sequence[Voice]
    encode: Callable[[np.ndarray, bool], np.ndarray]
    latent_frames: int

    def known(self, frames: int | None = None) -> tuple[int, bool]:
        return self.latent_frames, True

    def window(self, start: int, length: int) -> Conditions:
        """Beyond the end no sound is known, and a face mask that moves stays where it is."""
        told = self.fixed.window(start, length)
        if self.fixed.face_mask is not None and self.fixed.face_mask.ndim == 5:
            frames = np.minimum(start + np.arange(length), self.fixed.face_mask.shape[2] - 1)
            told = dataclasses.replace(told, face_mask=jnp.take(self.fixed.face_mask, frames, axis=2))
        if not self.voices:
            return told
        steps = audio_steps(start, length)
        with off_mesh():
            heard = np.stack([voice.read(steps.start, steps.stop) for voice in self.voices])
        tokens = self.encode(heard, start == 0)
        return dataclasses.replace(told, audio=jnp.asarray(tokens)[None])
