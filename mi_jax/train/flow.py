"""The flow-matching losses of the paper (Eq. 1, 3, 4), and one more, as pure functions with one value per example."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Key

from mi_jax.conditions import Conditions
from mi_jax.diffusion import add_noise, velocity_target
from mi_jax.mesh import spec_of

Velocity = Callable[[Float[Array, "b t h w c"], Float[Array, "b"], Conditions], Float[Array, "b t h w c"]]


def per_example(sigma: Float[Array, "b"] | Float[Array, ""], latents: Float[Array, "b t h w c"]) -> Float[Array, "b"]:
    """A noise level for each example, or the same for all, spread over a mesh as the examples are."""
    sigma = jnp.broadcast_to(sigma, latents.shape[:1])
    spec = spec_of(latents)
    return sigma if spec is None else jax.reshard(sigma, P(spec[0]))


def squared_error(
    velocity: Velocity,
    clean: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    sigma: Float[Array, "b"],
    conditions: Conditions | None,
) -> Float[Array, "b t h w c"]:
    """`|u - u_theta|^2` at every latent element, f32."""
    predicted = velocity(add_noise(clean, noise, sigma), sigma, conditions)
    return jnp.square(predicted.astype(jnp.float32) - velocity_target(clean, noise).astype(jnp.float32))


def base_loss(error: Float[Array, "b t h w c"]) -> Float[Array, "b"]:
    """`L_base` (Eq. 1): the mean over everything but the batch."""
    return jnp.mean(error, axis=(1, 2, 3, 4))


def region_area(region: Float[Array, "b h w"] | Float[Array, "b t h w"]) -> Float[Array, "b"]:
    """How many places a region marks in a frame; of one that moves, the mean over its frames.

    At least 1 in each frame that has any, and 1 where none has: what is divided by it stays finite.
    """
    area = jnp.sum(region, axis=(-2, -1))
    if region.ndim == 3:
        return jnp.maximum(area, 1.0)
    mean = jnp.mean(jnp.where(area > 0, jnp.maximum(area, 1.0), 0.0), axis=1)
    return jnp.where(mean > 0, mean, 1.0)


def adaptive_loss(
    error: Float[Array, "b t h w c"], region: Float[Array, "b h w"] | Float[Array, "b t h w"]
) -> Float[Array, "b"]:
    """`L_adap` (Eq. 3): the mean error over the face region, i.e. the masked sum times `HW / sum(M)`, or `THW / sum(M)`
    over a region that moves: every marked place of every frame weighs the same, and a frame without any nothing.

    The equation's literal form scales all of `L_base`; the text says that the weight grows "for the facial
    area", which is this reading: the smaller the face, the more each of its elements weighs. An empty region gives 0.
    """
    t, c = error.shape[1], error.shape[-1]
    places = "bhw" if region.ndim == 3 else "bthw"
    masked = jnp.einsum(f"bthwc,{places}->b", error, region.astype(error.dtype))
    return masked / (t * c * region_area(region))


def motion_loss(
    error: Float[Array, "b t h w c"], clean: Float[Array, "b t h w c"], portrait: Float[Array, "b h w c"]
) -> Float[Array, "b"]:
    """The mean error where something moves: each place of a frame counts by its mean distance to the portrait.

    What stands still is most of a talking picture and is learned by copying; what a prompt directs is the rest.
    The motion focal loss of MotiF (arXiv 2412.16153), with this distance in the place of optical flow. Latents that
    nowhere leave the portrait give 0.
    """
    moved = jnp.mean(jnp.abs(clean - portrait[:, None]), axis=-1)
    weighted = jnp.sum(moved * jnp.mean(error, axis=-1), axis=(1, 2, 3))
    total = jnp.sum(moved, axis=(1, 2, 3))
    return weighted / jnp.where(total > 0, total, 1.0)


def condition_dropout(
    key: Key[Array, ""], batch_size: int, each: float = 0.1, all_three: float = 0.05
) -> dict[str, Bool[Array, "b"]]:
    """Which of text, image and audio each example is trained without, so that guidance has its branches."""
    keys = jax.random.split(key, 4)
    everything = jax.random.bernoulli(keys[3], all_three, (batch_size,))
    names = ("text", "image", "audio")
    return {name: everything | jax.random.bernoulli(k, each, (batch_size,)) for name, k in zip(names, keys)}
