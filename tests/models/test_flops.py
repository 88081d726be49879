"""FLOPs by formula against those of the products that are traced, and against XLA's count."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from tiny_dit import SMALL, TALKING, conditions, latents_and_sigma

from mi_jax.models.attention import QUERY_CHUNK
from mi_jax.models.dit import DiT, DiTConfig
from mi_jax.models.flops import dit_flops, vae_decode_flops, vae_encode_flops
from mi_jax.models.vae import VAE, VAEConfig

WIDE = dataclasses.replace(SMALL, guidance_embedding=True, width=96, rope_axes=(8, 20, 20))


def products(jaxpr, times: int = 1) -> int:
    """Multiplies and adds of every product and convolution that a jaxpr runs."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "cond":  # the convolution by platform: the last branch is the library's
            total += products(eqn.params["branches"][-1].jaxpr, times)
            continue
        if eqn.primitive.name == "conv_general_dilated":
            out, kernel = eqn.outvars[0].aval, eqn.invars[1].aval
            total += 2 * times * out.size * kernel.size // out.shape[-1]
        if eqn.primitive.name == "dot_general":
            ((contracted, _), _) = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * times * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
        runs = times * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else times
        for inner in jaxprs_in_params(eqn.params):
            total += products(inner, runs)
    return total


def abstract(config: DiTConfig, **size: int):
    """A denoiser and what it is given, without an array."""
    graph, params = nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))))

    def told():
        x, sigma = latents_and_sigma(config, **size)
        extra = {"portrait": x[:, 0], "is_start": sigma} if config.token_replace else {}
        return x, sigma, dataclasses.replace(conditions(config, **size), **extra)

    given = jax.eval_shape(told)
    return lambda params, *given: nnx.merge(graph, params)(*given), params, given


@pytest.mark.parametrize("config", [SMALL, TALKING, WIDE, dataclasses.replace(SMALL, token_replace=True)])
@pytest.mark.parametrize("size", [{"t": 3, "h": 4, "w": 6}, {"t": 1, "h": 8, "w": 4}])
def test_the_formula_counts_every_product(config, size):
    run, params, given = abstract(config, b=2, **size)
    flops = dit_flops(config, size["t"], size["h"], size["w"], text_tokens=5 + 2 * config.image_to_video)
    assert (flops * 2).forward == products(jax.make_jaxpr(run)(params, *given).jaxpr)


def test_the_audio_encoder_counts_when_it_runs():
    run = lambda model, steps: model.encode_audio(steps, jnp.ones(1))  # noqa: E731
    graph, params = nnx.split(nnx.eval_shape(lambda: DiT(TALKING, rngs=nnx.Rngs(0))))
    steps = jax.ShapeDtypeStruct((1, 2, 8 * 3 + 8, 2, 8), jnp.float32)
    traced = jax.make_jaxpr(lambda params, steps: run(nnx.merge(graph, params), steps))(params, steps)
    size = {"frames": 3, "height": 4, "width": 6, "text_tokens": 7, "speakers": 2}
    more = dit_flops(TALKING, **size, encode=True).forward - dit_flops(TALKING, **size).forward
    assert more == products(traced.jaxpr)


def test_xla_counts_the_same_but_for_what_is_no_product():
    """XLA counts a loop's body once, so the loops are unrolled; softmax, norms and GELU are its other few per cent."""
    config = dataclasses.replace(
        SMALL, width=384, heads=3, rope_axes=(32, 48, 48), unroll=4, refiner_depth=1, remat="none"
    )
    size = {"t": 2, "h": 8, "w": 8}
    assert size["t"] * 16 + 5 <= QUERY_CHUNK
    run, params, given = abstract(config, b=1, **size)
    counted = jax.jit(run).lower(params, *given).compile().cost_analysis()["flops"]
    formula = dit_flops(config, size["t"], size["h"], size["w"], text_tokens=5).forward
    assert 1.0 < counted / formula < 1.04


def test_the_paper_s_model_at_720p():
    """33 x 90 x 160 latents are 118,800 tokens: 12.3 PFLOP, of which attention is 85 %."""
    flops = dit_flops(DiTConfig.magic_infinite_13b(), 33, 90, 160, text_tokens=400)
    assert flops.forward == pytest.approx(12.28e15, rel=1e-3)
    assert flops.attention / flops.forward == pytest.approx(0.85, abs=0.005)
    assert flops.executed_in_training(remat=False) == pytest.approx(3 * flops.linear + 3.5 * flops.attention)


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
    assert products(jax.make_jaxpr(VAE.encode)(vae, video).jaxpr) == vae_encode_flops(config, video.shape[1:4], batch=2)
    assert products(jax.make_jaxpr(VAE.decode)(vae, latents).jaxpr) == vae_decode_flops(config, (t, 2, 4), batch=2)
