"""Velocities whose video is known, or that tell apart everything a sampler could confuse."""

import jax.numpy as jnp
import numpy as np

from mi_jax.conditions import Conditions
from mi_jax.diffusion import sigma_schedule

SIGMAS = sigma_schedule(4, 3.0)
H, W, C, D = 2, 3, 4, 5


def told(length: int, b: int = 1) -> Conditions:
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return Conditions(
        text_tokens=normal(b, 3, D),
        text_mask=jnp.ones((b, 3), bool),
        portrait=normal(b, H, W, C),
        is_start=jnp.ones(b),
        audio=normal(b, 1, length, 2, D),
        face_mask=jnp.ones((b, 1, H, W)),
    )


def noise(length: int, b: int = 1, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(b, length, H, W, C)), jnp.float32)


def entangled(latents, sigma, conditions):
    """Nonlinear, and every frame depends on all frames of its window, on its place in it, and on every condition."""
    t = latents.shape[1]
    place = jnp.arange(t, dtype=latents.dtype).reshape(1, t, 1, 1, 1) / 10
    audio = conditions.audio.mean((1, 3, 4)).reshape(-1, t, 1, 1, 1) * conditions.face_mask.mean()
    start = conditions.is_start.reshape(-1, 1, 1, 1, 1)
    text = conditions.text_tokens.mean((1, 2)).reshape(-1, 1, 1, 1, 1)
    mixed = latents.mean(axis=1, keepdims=True) + conditions.portrait[:, None] * start
    return jnp.tanh(latents + mixed + place + audio + text) * (1 + sigma.reshape(-1, 1, 1, 1, 1))


MEAN, SPREAD = 1.5, 0.25


def gaussian(latents, sigma, conditions):
    """The velocity of data N(mean, SPREAD^2), mean as `conditions` says or MEAN: E[eps - x | x_sigma]."""
    sigma = sigma.reshape(-1, 1, 1, 1, 1).astype(jnp.float32)
    mean = MEAN if conditions is None else conditions.mean[..., None, None, None]
    noisy = latents.astype(jnp.float32) - (1 - sigma) * mean
    variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
    return noisy * (sigma - (1 - sigma) * SPREAD**2) / variance - mean
