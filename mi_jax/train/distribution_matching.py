"""Distribution matching distillation (paper Eq. 5 and 6, DMD2) as pure functions with one value per example.

A student that samples in a few Euler steps is pulled by the difference of two denoisers: of the teacher, which knows
the data, and of a critic, which is trained on what the student makes. Both see the student's clean latents `x` noised
to a level that the student need not know, and what they take for clean there gives the gradient. The critic's own loss
(Eq. 6) is `flow.base_loss` of `stop_gradient(x)`: the teacher's objective on the student's data.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from mi_jax.diffusion import clean_from_velocity, euler_step, shift_sigma
from mi_jax.train.flow import per_example

FLOOR = 1e-5
"""Of the normaliser of a gradient: where teacher and student agree to rounding, their difference is noise."""

Student = Callable[[Float[Array, "b t h w c"], Float[Array, "b"], Any], Float[Array, "b t h w c"]]
"""A velocity (see `flow.Velocity`) that is a pytree of its parameters, as modules are: `jax.tree_util.Partial` makes
one of a function and its parameters."""


def roll_out(
    student: Student,
    noise: Float[Array, "b t h w c"],
    sigmas: Float[Array, "levels"],
    exit_step: Int[Array, ""] | int,
    conditions: Any,
) -> Float[Array, "b t h w c"]:
    """The clean latents that the student takes for its result at step `exit_step` of its own Euler sampler.

    Only that step is differentiated, and no other is computed in vain: the steps before it are a loop with a traced
    number of trips. On a mesh every device must draw the same step.

    Args:
      sigmas: the student's levels from 1 to 0 (`diffusion.sigma_schedule`).
      exit_step: 0 .. levels - 2; at the last the student's sample is the result.
    """
    frozen = jax.lax.stop_gradient(student)

    def step(i, latents):
        u = frozen(latents, per_example(sigmas[i], latents), conditions)
        return euler_step(latents, u.astype(latents.dtype), sigmas[i], sigmas[i + 1])

    latents = jax.lax.stop_gradient(jax.lax.fori_loop(0, exit_step, step, noise))
    sigma = per_example(sigmas[exit_step], latents)
    return clean_from_velocity(latents, student(latents, sigma, conditions).astype(latents.dtype), sigma)


def matching_sigma(
    key: Key[Array, ""], shape: tuple[int, ...], shift: float, low: float = 0.02, high: float = 0.98
) -> Float[Array, "..."]:
    """Levels at which teacher and critic are compared: uniform, then shifted, and kept off both ends, where the one
    knows all and the other nothing."""
    return jnp.clip(shift_sigma(jax.random.uniform(key, shape), shift), low, high)


def matching_gradient(
    generated: Float[Array, "b ..."],
    fake: Float[Array, "b ..."],
    real: Float[Array, "b ..."],
    floor: float = FLOOR,
) -> tuple[Float[Array, "b ..."], Float[Array, "b"]]:
    """Eq. 5: `(x_fake - x_real) / mean|x - x_real|` of every example, and that mean; f32.

    fake, real: what critic and (guided) teacher take for clean of the noised `generated`. Not differentiated. Values
    that are not finite are 0: they move nothing.
    """
    generated, fake, real = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (generated, fake, real))
    axes = tuple(range(1, generated.ndim))
    mean = jnp.mean(jnp.abs(generated - real), axis=axes, keepdims=True)
    gradient = jnp.nan_to_num((fake - real) / jnp.maximum(mean, floor), nan=0.0, posinf=0.0, neginf=0.0)
    return gradient, jnp.squeeze(mean, axes)


def matching_loss(
    generated: Float[Array, "b ..."],
    gradient: Float[Array, "b ..."],
    weight: Float[Array, "b ..."] | None = None,
) -> Float[Array, "b"]:
    """`0.5 mean (x - sg(x - g))^2`: its gradient in `generated` is `g` over the number of an example's elements.

    weight: of every element, where some count more (a face) or not at all (latents that are given).
    """
    generated = generated.astype(jnp.float32)
    error = 0.5 * jnp.square(generated - jax.lax.stop_gradient(generated - gradient))
    error = error if weight is None else error * weight
    return jnp.mean(error, axis=tuple(range(1, generated.ndim)))


def restore_norm(
    guided: Float[Array, "b ..."], plain: Float[Array, "b ..."], share: float = 1.0
) -> Float[Array, "b ..."]:
    """Guided clean latents with the standard deviation of those without guidance, or part of the way there: strong
    guidance saturates colours, and a student learns them (Lin et al., arXiv 2305.08891)."""
    axes = tuple(range(1, guided.ndim))
    ratio = jnp.std(plain, axis=axes, keepdims=True) / jnp.maximum(jnp.std(guided, axis=axes, keepdims=True), FLOOR)
    return guided * (1 + share * (ratio - 1))
