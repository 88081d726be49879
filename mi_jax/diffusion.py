"""The one convention of noise and velocity.

`sigma` is the noise level: 1 is pure noise, 0 is data. This is HunyuanVideo's direction and that of Eq. 5-7 of the
MagicInfinite paper; its Eq. 1 runs the other way (t = 1 - sigma, v = -u). Everything here is pure and shape-agnostic:
`sigma` is a scalar or one value per example, and is spread over the remaining axes of the latents.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

TIMESTEPS = 1000.0
"""The network is fed `TIMESTEPS * sigma`, as HunyuanVideo was trained."""


def _per_example(sigma: Float[Array, "..."], like: Float[Array, "..."]) -> Float[Array, "..."]:
    """`sigma` of rank 0 or 1, with trailing unit axes so that it multiplies `like`, in its dtype."""
    return jnp.reshape(sigma, sigma.shape + (1,) * (like.ndim - sigma.ndim)).astype(like.dtype)


def add_noise(
    clean: Float[Array, "b ..."], noise: Float[Array, "b ..."], sigma: Float[Array, "b"] | Float[Array, ""]
) -> Float[Array, "b ..."]:
    """`x_sigma = (1 - sigma) * x + sigma * eps`."""
    sigma = _per_example(sigma, clean)
    return (1 - sigma) * clean + sigma * noise


def velocity_target(clean: Float[Array, "b ..."], noise: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """`u = eps - x`, what the denoiser predicts at every sigma."""
    return noise - clean


def clean_from_velocity(
    noisy: Float[Array, "b ..."], velocity: Float[Array, "b ..."], sigma: Float[Array, "b"] | Float[Array, ""]
) -> Float[Array, "b ..."]:
    """`x_hat = x_sigma - sigma * u`, the clean latents that a velocity implies."""
    return noisy - _per_example(sigma, noisy) * velocity


def shift_sigma(sigma: Float[Array, "..."], shift: float) -> Float[Array, "..."]:
    """`sigma' = k sigma / (1 + (k - 1) sigma)`: moves noise levels towards 1 as large latents need (SD3,
    HunyuanVideo)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigma_schedule(steps: int, shift: float) -> Float[Array, "{steps}+1"]:
    """Noise levels of an Euler sampler: `steps + 1` values from 1 to 0, evenly spaced and then shifted."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return shift_sigma(jnp.linspace(1.0, 0.0, steps + 1, dtype=jnp.float32), shift)


def sample_sigma(key: Key[Array, ""], shape: tuple[int, ...], shift: float, scale: float = 1.0) -> Float[Array, "..."]:
    """Training noise levels: `sigmoid(N(0, scale^2))`, then shifted (HunyuanVideo-I2V, Magic-1-For-1: scale 1)."""
    return shift_sigma(jax.nn.sigmoid(scale * jax.random.normal(key, shape, jnp.float32)), shift)


def euler_step(
    noisy: Float[Array, "b ..."],
    velocity: Float[Array, "b ..."],
    sigma: Float[Array, "b"] | Float[Array, ""],
    sigma_next: Float[Array, "b"] | Float[Array, ""],
) -> Float[Array, "b ..."]:
    """`x_next = x_sigma + (sigma_next - sigma) * u`."""
    return noisy + _per_example(sigma_next - sigma, noisy) * velocity
