"""The denoiser on eight devices: what one device computes, gradients included, with tokens that do not divide."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from tiny_dit import SMALL, TALKING, conditions, kept_by, latents_and_sigma, random_dit

from mi_jax.mesh import make_mesh, parameter_spec, shard_parameters
from mi_jax.models.dit import DiT, DiTConfig

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


TAPS = (("double", 0), ("single", 3))


def beside_a_reference(model, x, sigma, told):
    """The velocity of two frames beside a third that is a reference, and hidden states."""
    embedded = model.embed(x[:, :2], sigma, told, extra_latents=x[:, 2:], extra_times=jnp.asarray([-1.0]))
    video, hidden = model.trunk(*embedded, TAPS)
    return model.unembed(video, embedded[2], x[:, :2], sigma, told), hidden


def test_references_and_taps_on_a_mesh():
    """12 video tokens and 6 of a reference on 4 devices; the examples may also be whole on every device."""
    graph, params = nnx.split(random_dit(TALKS))
    x, sigma = latents_and_sigma(TALKS, b=2)
    given = x, sigma, conditions(TALKS).window(0, 2)
    run = lambda params, *told: beside_a_reference(nnx.merge(graph, params), *told)  # noqa: E731
    u, hidden = jax.jit(run)(params, *given)
    mesh = make_mesh(data=2, seq=4)
    with jax.set_mesh(mesh):
        spread = shard_parameters(params, mesh)
        for spec in (P("data"), P()):
            placed = jax.tree.map(lambda leaf, spec=spec: jax.device_put(leaf, spec), given)
            got_u, got_hidden = jax.jit(run)(spread, *placed)
            assert np.linalg.norm(np.asarray(got_u) - u) < 1e-5 * np.linalg.norm(u)
            for tap in TAPS:
                assert got_hidden[tap].sharding.spec[1] == "seq"
                np.testing.assert_allclose(np.asarray(got_hidden[tap])[:, :18], hidden[tap], rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_gradients_through_references_and_taps_on_a_mesh():
    """A head on hidden states, as of a GAN: what reaches the parameters and the latents is what reaches them on one
    device. Tokens that fill up a device's share reach nothing."""
    graph, params = nnx.split(random_dit(TALKS))
    x, sigma = latents_and_sigma(TALKS, b=2)
    given = x, sigma, conditions(TALKS).window(0, 2)

    def loss(params, *told):
        u, hidden = beside_a_reference(nnx.merge(graph, params), *told)
        real = lambda h: (jnp.arange(h.shape[1]) < 18).astype(h.dtype)[:, None]  # noqa: E731
        read = sum(jnp.sum(jnp.sin(hidden[tap]) * real(hidden[tap])[None]) for tap in TAPS)
        return jnp.mean(jnp.sin(u)) + read / 1000

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))
    expected = jax.tree.leaves(gradients(params, *given))
    mesh = make_mesh(data=2, seq=4)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda leaf: jax.device_put(leaf, P("data")), given)
        got = jax.tree.leaves(gradients(shard_parameters(params, mesh), *placed))
    total = np.sqrt(sum(float(np.square(leaf).sum()) for leaf in expected))
    for one, other in zip(expected, got, strict=True):
        assert np.linalg.norm(np.asarray(other) - one) < 1e-5 * max(np.linalg.norm(one), 1e-2 * total)


def test_the_backward_pass_gathers_parameters_again():
    """With all activations kept, gathered parameters are not: the whole model would be. What the scans over depth keep
    is spread over the devices, or small."""
    config = dataclasses.replace(TALKS, remat="none")
    graph, params = nnx.split(nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0))))
    mesh = make_mesh(data=8)
    place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))  # noqa: E731
    with jax.set_mesh(mesh):
        spread = jax.tree.map(lambda leaf: place(leaf, parameter_spec(leaf.shape, mesh)), params)
        given = jax.tree.map(lambda leaf: place(leaf, P("data")), example(config, BATCH))
        jaxpr = jax.make_jaxpr(lambda *a: loss_and_gradients(graph, *a))(spread, *given)
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan" and not eqn.params["reverse"]]
    assert [eqn.params["length"] for eqn in scans] == [config.refiner_depth, 2, 2]
    kept = [aval for eqn in scans for aval in kept_by(eqn)]
    assert len(kept) > 50
    assert [str(aval) for aval in kept if aval.size > 2 * 4 * config.width and not any(aval.sharding.spec)] == []
