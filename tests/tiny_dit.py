"""Denoisers of a few channels, and what they are told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mi_jax.conditions import Conditions
from mi_jax.models.audio_encoder import AudioEncoderConfig
from mi_jax.models.dit import DiT, DiTConfig

SMALL = DiTConfig(width=48, heads=2, double_depth=2, single_depth=4, text_dim=20, pooled_dim=12, rope_axes=(4, 10, 10))
TALKING = dataclasses.replace(
    SMALL, image_to_video=True, audio=AudioEncoderConfig(input_dim=8, layers=2, width=16, heads=2, depth=1)
)


def random_dit(config: DiTConfig, seed: int = 0, scale: float = 0.15) -> DiT:
    """Every leaf random: zero-initialised gates would hide most of the network. By NumPy, which compiles nothing."""
    graph, state = nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(draw, state))


velocity = jax.jit(DiT.__call__)
"""Compiled once for all tests of a file that ask the same of models of one config."""


def conditions(
    config: DiTConfig, seed: int = 0, b: int = 2, s: int = 1, t: int = 3, h: int = 4, w: int = 6
) -> Conditions:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    parts = {
        "text_tokens": normal(b, 5, config.text_dim),
        "text_mask": jnp.arange(5)[None] < jnp.asarray([[3], [5]])[:b],
        "text_pooled": normal(b, config.pooled_dim),
    }
    if config.guidance_embedding:
        parts["guidance"] = jnp.full((b,), 1.0)  # at 6.0 two f32 tables of the angle 6000 rad differ by 4e-4
    if config.image_to_video:
        parts |= {
            "image_tokens": normal(b, 2, config.text_dim),
            "image_mask": jnp.ones((b, 2), bool),
            "portrait": normal(b, h, w, config.latent_channels),
            "is_start": jnp.ones((b,)),
        }
    if config.audio:
        parts |= {
            "audio": normal(b, s, t, config.audio.tokens, config.audio.width),
            "face_mask": jnp.ones((b, s, h, w)),
        }
    return Conditions(**parts)


def latents_and_sigma(config: DiTConfig, b: int = 2, t: int = 3, h: int = 4, w: int = 6):
    x = np.random.default_rng(9).normal(size=(b, t, h, w, config.latent_channels))
    return jnp.asarray(x, jnp.float32), jnp.asarray([0.9, 0.3])[:b]


def kept_by(scan) -> list:
    """Shapes of what a scan of a jaxpr keeps of every step: results with an axis more than its body's."""
    body = scan.params["jaxpr"]
    inner = getattr(body, "jaxpr", body).outvars
    return [v.aval for v, one in zip(scan.outvars, inner, strict=True) if v.aval.ndim > one.aval.ndim]
