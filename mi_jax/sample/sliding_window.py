"""Sampling a video of any length with a denoiser of bounded length (paper 4.1.3)."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from mi_jax.conditions import Windowed
from mi_jax.diffusion import euler_step
from mi_jax.mesh import axis_size, gather, spread_batch
from mi_jax.sample.guidance import Velocity
from mi_jax.sample.windows import blend_weights, plan_windows


def sliding_window(
    velocity: Velocity,
    noise: Float[Array, "b t h w c"],
    sigmas: Float[Array, "levels"],
    conditions: Windowed | None = None,
    *,
    window: int = 33,
    overlap: int = 8,
    group: int = 1,
) -> Float[Array, "b t h w c"]:
    """Latents at the last noise level, from `noise` at the first.

    At each noise level every window of the whole latent video passes through `velocity` with its own slice of the
    conditions, the velocities are blended, and one Euler step moves the whole video. Windows only meet in that blend,
    so one noise level may compute them in any order and any number at a time.

    Pure, and made to be traced by `jax.jit`: one scan over noise levels, one over groups of windows. A call with noise
    levels [s0, s1, s2] equals one with [s0, s1] followed by one with [s1, s2], so a caller who wants to watch feeds two
    at a time, through one compilation.

    Args:
      velocity: any function of (latents [n window h w c], sigma [n], conditions of n examples); may close over a model.
        What it returns is blended in f32, or in the latents' dtype if that is wider.
      conditions: those of the whole video, `Conditions` or anything else that cuts itself (`Windowed`); or None, which
        `velocity` is then given.
      window, overlap: latent frames. A shorter video is one window.
      group: windows on the network at a time: memory against parallelism. On a mesh with a `data` axis (`jax.set_mesh`)
        the windows of a group, times the branches of `Guidance`, are spread over it, so that product times b should be
        a multiple of its size (`mi_jax.sample.layout.group_size`).

    Raises:
      InputError: an overlap under 3, or not under the window.
    """
    length = noise.shape[1]
    starts = plan_windows(length, window, overlap)
    window = min(window, length)
    weights = blend_weights(starts, window, length)
    # A group that the last windows do not fill is filled up only as far as it takes to share it out over `data`.
    spread = math.gcd(group, axis_size("data"))
    group = min(group, -(-len(starts) // spread) * spread)
    padding = -len(starts) % group
    # Padding of the last group: a window that is there already, of no weight.
    starts = np.pad(starts, (0, padding), mode="edge").reshape(-1, group)
    weights = np.pad(weights, ((0, padding), (0, 0))).reshape(-1, group, window)

    def level(latents, pair):
        u = _blended(velocity, latents, pair[0], conditions, jnp.asarray(starts), jnp.asarray(weights))
        return euler_step(latents, u, pair[0], pair[1]), None

    return jax.lax.scan(level, noise, (sigmas[:-1], sigmas[1:]))[0]


def _blended(
    velocity: Velocity, latents: Array, sigma: Array, conditions: Windowed | None, starts: Array, weights: Array
):
    """The velocity of the whole video at one noise level, by windows `starts` [g k] and `weights` [g k window]."""
    b = latents.shape[0]
    length = weights.shape[-1]

    def add_group(total, plan):
        starts, weights = plan
        cut = jax.vmap(partial(jax.lax.dynamic_slice_in_dim, latents, slice_size=length, axis=1))
        windows = rearrange(cut(starts), "k b t h w c -> (k b) t h w c")
        parts = None
        if conditions is not None:
            cut_conditions = [conditions.window(start, length) for start in starts]
            parts = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *cut_conditions)
        windows, parts = spread_batch((windows, parts))
        u = velocity(windows, jnp.full(windows.shape[:1], sigma), parts)
        u = rearrange(gather(u).astype(total.dtype), "(k b) t h w c -> k b t h w c", b=b)
        # One after the other, not as a scatter: the order of a sum decides its last bit.
        for start, weight, part in zip(starts, weights, u):
            there = jax.lax.dynamic_slice_in_dim(total, start, length, axis=1)
            there = there + weight.reshape(1, -1, 1, 1, 1) * part
            total = jax.lax.dynamic_update_slice_in_dim(total, there, start, axis=1)
        return total, None

    total = jnp.zeros_like(latents, dtype=latents.dtype if latents.dtype.itemsize >= 4 else jnp.float32)
    return jax.lax.scan(add_group, total, (starts, weights))[0].astype(latents.dtype)
