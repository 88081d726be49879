"""Operations by formula against those of the traced program, and against XLA's own count."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import Jaxpr
from tiny_dit import SMALL, TALKING, conditions, latents_and_sigma

from mi_jax.models.dit import DiT
from mi_jax.models.flops import dit_flops, vae_decode_flops, vae_encode_flops
from mi_jax.models.vae import VAE, VAEConfig


def counted(jaxpr) -> int:
    """Operations of the products and convolutions of a jaxpr, scans as often as they run."""
    total = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            contracted = params["dimension_numbers"][0][0]
            total += 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            total += 2 * eqn.outvars[0].aval.size * eqn.invars[1].aval.size // eqn.outvars[0].aval.shape[-1]
        elif name == "cond":  # the convolution by platform: the last branch is the library's
            total += counted(params["branches"][-1].jaxpr)
        else:
            times = params["length"] if name == "scan" else 1
            inner = [getattr(value, "jaxpr", value) for value in params.values()]
            total += times * sum(counted(part) for part in inner if isinstance(part, Jaxpr))
    return total


def program(f, *arguments):
    return counted(jax.make_jaxpr(f)(*arguments).jaxpr)


@pytest.mark.parametrize("speakers", [0, 1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guidance_embedding": True, "refiner_depth": 1, "mlp_ratio": 3},
        {"token_replace": True, "image_to_video": False, "pooled_dim": None},
    ],
)
def test_denoiser_counts_what_its_program_multiplies(changes, speakers):
    config = dataclasses.replace(TALKING if speakers else SMALL, **changes)
    model = nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
    x, sigma = latents_and_sigma(config)
    told = conditions(dataclasses.replace(config, pooled_dim=12), s=max(speakers, 1))
    if config.token_replace:
        told = dataclasses.replace(told, portrait=x[:, 0], is_start=jnp.ones(2))
    text = told.text_tokens.shape[1] + (0 if told.image_tokens is None else told.image_tokens.shape[1])
    expected = dit_flops(config, (3, 4, 6), text_tokens=text, batch=2, speakers=speakers)
    assert program(lambda model, x: model(x, sigma, told), model, x) == expected


def test_denoiser_counts_what_xla_counts():
    """XLA also counts what is not a product, and a scan's body once: here all bodies are unrolled."""
    config = dataclasses.replace(SMALL, width=192, heads=4, rope_axes=(16, 16, 16), unroll=2, remat=False)
    graph, weights = nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))))
    x, sigma = latents_and_sigma(config, t=3, h=8, w=8)
    told = conditions(config)
    velocity = jax.jit(lambda weights, x: nnx.merge(graph, weights)(x, sigma, told))
    xla = velocity.lower(weights, x).compile().cost_analysis()["flops"]
    assert 1 < xla / dit_flops(config, (3, 8, 8), text_tokens=5, batch=2) < 1.05


SMALL_VAE = {"latent_channels": 4, "norm_groups": 4}


@pytest.mark.parametrize(
    "config",
    [
        VAEConfig(widths=(8, 16, 24, 24), **SMALL_VAE),
        dataclasses.replace(VAEConfig.puppet(), widths=(16, 20, 16, 16), time_kernels=(1, 3, 1, 1)),
    ],
)
@pytest.mark.parametrize("t", [1, 3])
def test_vae_counts_what_its_program_multiplies(config, t):
    vae = nnx.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0)))
    video = jax.ShapeDtypeStruct((2, 4 * (t - 1) + 1, 16, 32, 3), jnp.float32)
    latents = jax.ShapeDtypeStruct((2, t, 2, 4, config.latent_channels), jnp.float32)
    assert program(VAE.encode, vae, video) == vae_encode_flops(config, video.shape[1:4], batch=2)
    assert program(VAE.decode, vae, latents) == vae_decode_flops(config, (t, 2, 4), batch=2)


def test_hunyuan_video_at_its_size():
    """Parameters x tokens x 2, and attention, put a bound on both sides of a size that no test can run."""
    from mi_jax.models.dit_config import DiTConfig

    grid, text = (33, 90, 160), 256
    tokens = 33 * 45 * 80
    total = dit_flops(DiTConfig.hunyuan_video(), grid, text_tokens=text)
    attention = 60 * 4 * (tokens + text) ** 2 * 3072
    products = 60 * 24 * (tokens + text) * 3072**2
    np.testing.assert_allclose(total, attention + products, rtol=1e-3)
