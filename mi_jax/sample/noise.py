"""The noise that a video begins as, drawn or cut where a window asks for it."""

import dataclasses
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from mi_jax.diffusion import add_noise


@runtime_checkable
class Drawn(Protocol):
    """Noise of any length."""

    def window(self, start: int, length: int) -> Float[Array, "b {length} h w c"]: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrameNoise:
    """Noise drawn frame by frame, for videos without end: a frame's does not depend on the length of the video."""

    key: Key[Array, ""]
    shape: tuple[int, int, int, int] = dataclasses.field(metadata={"static": True})
    """[b h w c] of one frame."""

    def window(self, start: int | Int[Array, ""], length: int) -> Float[Array, "b {length} h w c"]:
        return _drawn(self, start, length)


@partial(jax.jit, static_argnames="length")
def _drawn(noise: FrameNoise, start: int | Array, length: int) -> Array:
    draw = lambda frame: jax.random.normal(jax.random.fold_in(noise.key, frame), noise.shape, jnp.float32)  # noqa: E731
    return jnp.moveaxis(jax.vmap(draw)(start + jnp.arange(length)), 0, 1)


@dataclasses.dataclass(frozen=True)
class GivenNoise:
    """Noise [b t h w c] of a whole video."""

    noise: Any

    def window(self, start: int, length: int) -> Array:
        return jnp.array(self.noise[:, start : start + length])


@dataclasses.dataclass(frozen=True)
class NoiseAndPortrait:
    """Noise that holds a share of the portrait."""

    noise: Any
    portrait: Array
    share: float

    def window(self, start: int, length: int) -> Array:
        return add_noise(self.portrait[:, None], self.noise.window(start, length), jnp.float32(1 - self.share))
