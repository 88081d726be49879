"""Classifier-free guidance over audio and text (paper Eq. 7)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from mi_jax.conditions import Conditions, concatenate
from mi_jax.mesh import batch_axis, spread_batch

Velocity = Callable[[Float[Array, "b t h w c"], Float[Array, "b"], Conditions], Float[Array, "b t h w c"]]
"""`velocity(latents, sigma, conditions)`: any denoiser; `mi_jax.models.dit.DiT` is one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """`Guidance(audio=2.0)(velocity)` is the guided velocity

        u = u_all + w_audio (u_all - u_no_audio) + w_text (u_no_audio - u_none)      sigma <  two_fold_above
        u = u_all + w_audio (u_all - u_none)                                         sigma >= two_fold_above

    The second is the first with w_text = w_audio. (Eq. 7 as printed adds two full guided velocities, so that its
    coefficients sum to 2; this is the form with coefficients summing to 1.) `u_none` lacks text, portrait and audio.

    audio, text: the weights: numbers, or arrays of one value or of one per example (distillation).
    two_fold_above: the noise level, as the network is fed it, from which on the two-fold form is used.

    The branches are one batch, on a mesh spread over its `data` axis. Branches that number weights of 0 leave without
    effect are not computed: both 0 costs one evaluation, text 0 two (what is dropped is chosen by sigma), else three.
    """

    audio: float | Float[Array, ""] | Float[Array, "b"] = 0.0
    text: float | Float[Array, ""] | Float[Array, "b"] = 0.0
    two_fold_above: float | Float[Array, ""] = 0.75

    @property
    def branches(self) -> int:
        """Evaluations of the denoiser that one guided velocity takes."""
        if _is_zero(self.text):
            return 1 if _is_zero(self.audio) else 2
        return 3

    def __call__(self, velocity: Velocity) -> Velocity:
        """`velocity`, guided."""
        if self.branches == 1:
            return velocity

        def guided(latents, sigma, conditions):
            two_fold = sigma >= self.two_fold_above
            audio = _per_example(self.audio, latents).astype(latents.dtype)
            if self.branches == 2:
                without = conditions.drop(text=two_fold, image=two_fold, audio=True)
                u_all, u_without = _branches(velocity, latents, sigma, [conditions, without])
                return u_all + audio * (u_all - u_without)
            text = _per_example(self.text, latents).astype(latents.dtype)
            text = jnp.where(_per_example(two_fold, latents), audio, text)
            parts = [conditions, conditions.drop(audio=True), conditions.drop(text=True, image=True, audio=True)]
            u_all, u_no_audio, u_none = _branches(velocity, latents, sigma, parts)
            return u_all + audio * (u_all - u_no_audio) + text * (u_no_audio - u_none)

        return guided


def _branches(velocity: Velocity, latents: Array, sigma: Array, parts: list[Conditions]) -> list[Array]:
    """The velocity under each of the conditions, in one batch."""
    n = len(parts)
    u = velocity(*spread_batch((jnp.concatenate([latents] * n), jnp.concatenate([sigma] * n), concatenate(parts))))
    if batch_axis(u) != batch_axis(latents):  # a branch alone is not divided as all of them are
        u = jax.reshard(u, P(batch_axis(latents)))
    return jnp.split(u, n)


def _is_zero(weight: float | Array) -> bool:
    """Known to be 0 before anything is traced."""
    return isinstance(weight, int | float | np.number) and weight == 0


def _per_example(value: float | Array, like: Array) -> Array:
    return jnp.reshape(jnp.asarray(value), (-1,) + (1,) * (like.ndim - 1))
