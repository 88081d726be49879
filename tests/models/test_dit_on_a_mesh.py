"""The denoiser on eight devices: what one device computes, gradients included, with tokens that do not divide."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from tiny_dit import SMALL, TALKING, conditions, latents_and_sigma, random_dit

from mi_jax.mesh import make_mesh, shard_parameters
from mi_jax.models.dit import DiTConfig

BATCH = 8
HEADS = {"heads": 4, "rope_axes": (4, 4, 4)}
TALKS = dataclasses.replace(TALKING, **HEADS)
REPLACES = dataclasses.replace(SMALL, token_replace=True, guidance_embedding=True, **HEADS)


def example(config: DiTConfig, batch: int):
    """18 video tokens and 7 or 5 of text: neither divides by 4 or 8."""
    x, sigma = latents_and_sigma(config, b=2)
    told = conditions(config)
    if config.token_replace:
        told = dataclasses.replace(told, portrait=x[:, 1], is_start=jnp.asarray([1.0, 0.0]))
    many = lambda leaf: jnp.tile(leaf, (batch // 2,) + (1,) * (leaf.ndim - 1))  # noqa: E731
    return jax.tree.map(many, (x, sigma, told))


def loss_and_gradients(graph, params, x, sigma, told):
    def loss(params):
        u = nnx.merge(graph, params)(x, sigma, told)
        return jnp.mean(jnp.sin(u)), u

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.cache
def whole(config: DiTConfig):
    """What one device computes, without the rematerialisation that changes no gradient."""
    graph, params = nnx.split(random_dit(dataclasses.replace(config, remat="none")))
    (_, u), gradients = jax.jit(lambda *a: loss_and_gradients(graph, *a))(params, *example(config, BATCH))
    return u, gradients


@pytest.mark.parametrize(
    ("config", "data", "seq", "ulysses"),
    [(TALKS, 8, 1, None), (TALKS, 2, 4, 2), (REPLACES, 2, 4, None)],
    ids=["data", "ulysses-and-ring", "token-replace"],
)
def test_a_spread_denoiser_equals_a_whole_one(config, data, seq, ulysses):
    u, expected = whole(config)
    graph, params = nnx.split(random_dit(dataclasses.replace(config, ulysses=ulysses)))
    mesh = make_mesh(data=data, seq=seq)
    with jax.set_mesh(mesh):
        spread = shard_parameters(params, mesh)
        given = jax.tree.map(lambda leaf: jax.device_put(leaf, P("data")), example(config, BATCH))
        (_, got_u), got = jax.jit(lambda *a: loss_and_gradients(graph, *a))(spread, *given)
    assert np.linalg.norm(np.asarray(got_u) - u) < 1e-5 * np.linalg.norm(u)
    assert got_u.sharding.spec[0] == "data"
    total = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(expected)))
    for one, other, where in zip(*map(jax.tree.leaves, (expected, got, spread))):
        assert other.sharding.is_equivalent_to(where.sharding, one.ndim)  # gradients lie where their parameters do
        assert np.linalg.norm(np.asarray(other) - one) < 1e-5 * max(np.linalg.norm(one), 1e-2 * total)
