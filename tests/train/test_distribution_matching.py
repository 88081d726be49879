"""Distillation on data whose denoisers are known in closed form: Gaussians N(m, q^2)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from mi_jax.diffusion import add_noise, clean_from_velocity, euler_step, sigma_schedule, velocity_target
from mi_jax.mesh import make_mesh
from mi_jax.train.distribution_matching import (
    matching_gradient,
    matching_loss,
    matching_sigma,
    restore_norm,
    roll_out,
)
from mi_jax.train.flow import base_loss, per_example, squared_error

SHAPE = (64, 1, 2, 2, 1)


def gaussian(mean, spread, x, sigma, conditions=None):
    """The velocity of data N(mean, spread^2): what the noise is expected to be, less the data."""
    s = sigma.reshape(-1, 1, 1, 1, 1)
    away = x - (1 - s) * mean
    variance = (1 - s) ** 2 * spread**2 + s**2
    return s * away / variance - (mean + (1 - s) * spread**2 * away / variance)


def normal(seed: int, shape=SHAPE) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_the_difference_of_two_gaussians_is_that_of_their_means():
    """x_fake - x_real = (m_f - m_r) sigma^2 / ((1 - sigma)^2 q^2 + sigma^2), whatever the sample."""
    real, fake, q = 0.7, -0.4, 0.5
    sigma = matching_sigma(jax.random.key(1), SHAPE[:1], 3.0)
    x = fake + q * normal(0)
    noised = add_noise(x, normal(2), sigma)
    clean = [clean_from_velocity(noised, gaussian(m, q, noised, sigma), sigma) for m in (fake, real)]
    gradient, mean = matching_gradient(x, *clean)
    expected = (fake - real) * sigma**2 / ((1 - sigma) ** 2 * q**2 + sigma**2)
    unscaled = gradient * mean.reshape(-1, 1, 1, 1, 1)
    np.testing.assert_allclose(unscaled, np.broadcast_to(expected.reshape(-1, 1, 1, 1, 1), SHAPE), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mean, np.abs(np.asarray(x - clean[1])).mean((1, 2, 3, 4)), rtol=1e-6)


def test_the_loss_has_that_gradient():
    x, g, weight = normal(0), normal(1), jnp.abs(normal(2))
    got = jax.grad(lambda x: matching_loss(x, g).sum())(x)
    np.testing.assert_allclose(got, g / 4, rtol=1e-5, atol=1e-6)
    got = jax.grad(lambda x: matching_loss(x, g, weight).sum())(x)
    np.testing.assert_allclose(got, g * weight / 4, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(matching_loss(x, g), 0.5 * np.square(g).mean((1, 2, 3, 4)), rtol=1e-4)


def test_what_is_not_finite_moves_nothing_and_what_agrees_does_not_explode():
    x = normal(0)
    broken = x.at[0, 0, 0, 0, 0].set(jnp.nan).at[1, 0, 0, 0, 0].set(jnp.inf)
    gradient, _ = matching_gradient(x, broken, x + 1)
    assert np.isfinite(gradient).all()
    assert not gradient[0, 0, 0, 0, 0]
    assert not gradient[1, 0, 0, 0, 0]
    gradient, mean = matching_gradient(x, x + 1e-7, x)
    assert float(mean.max()) == 0
    assert np.abs(gradient).max() < 0.05
    half = matching_gradient(*(a.astype(jnp.bfloat16) for a in (x, x + 1, x - 1)))
    assert {leaf.dtype for leaf in half} == {jnp.dtype(jnp.float32)}


def test_levels_are_uniform_shifted_and_off_the_ends():
    drawn = np.asarray(matching_sigma(jax.random.key(0), (20_000,), 3.0))
    assert drawn.min() == pytest.approx(0.02)
    assert drawn.max() == pytest.approx(0.98)
    unshifted = drawn / (3 - 2 * drawn)
    inside = unshifted[(drawn > 0.02) & (drawn < 0.98)]
    assert np.mean(inside < np.median([inside.min(), inside.max()])) == pytest.approx(0.5, abs=0.02)


def affine(params, x, sigma, conditions):
    """A student of two numbers at every level."""
    return params["scale"] * x + params["offset"] * sigma[:, None, None, None, None] + conditions


@pytest.mark.parametrize("exit_step", [0, 1, 3])
def test_the_exit_step_alone_is_differentiated(exit_step):
    params, told = {"scale": jnp.float32(0.3), "offset": jnp.float32(-0.2)}, jnp.float32(0.1)
    sigmas, noise = sigma_schedule(4, 3.0), normal(0)

    def unrolled(params):
        x = noise
        for i in range(exit_step):
            u = affine(jax.lax.stop_gradient(params), x, jnp.full(SHAPE[:1], sigmas[i]), told)
            x = euler_step(x, u, sigmas[i], sigmas[i + 1])
        sigma = jnp.full(SHAPE[:1], sigmas[exit_step])
        return clean_from_velocity(x, affine(params, x, sigma, told), sigma)

    def rolled(params, step):
        return roll_out(jax.tree_util.Partial(affine, params), noise, sigmas, step, told)

    weights = normal(3)
    measure = lambda f: jax.jit(jax.value_and_grad(lambda *a: jnp.vdot(f(*a), weights)))  # noqa: E731
    expected, got = measure(unrolled)(params), measure(rolled)(params, jnp.int32(exit_step))
    for one, two in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5)


def test_no_step_is_computed_in_vain():
    """One program for all exit steps, that evaluates the student at as many levels as it must."""
    seen = []

    def counted(params, x, sigma, conditions):
        jax.debug.callback(lambda s: seen.append(round(float(s), 4)), sigma[0])
        return params * x

    sigmas = sigma_schedule(4, 3.0)
    run = jax.jit(lambda step: roll_out(jax.tree_util.Partial(counted, jnp.ones(())), normal(0), sigmas, step, None))
    for step in (0, 2, 3):
        seen.clear()
        run(jnp.int32(step)).block_until_ready()
        jax.effects_barrier()
        assert sorted(seen, reverse=True) == [round(float(s), 4) for s in sigmas[: step + 1]]
    assert run._cache_size() == 1


def test_on_a_mesh_it_is_what_it_is_on_one_device():
    sigmas, noise = sigma_schedule(4, 3.0), normal(0, (8, 2, 4, 4, 3))

    def measured(params, noise, step):
        x = roll_out(jax.tree_util.Partial(affine, params), noise, sigmas, step, jnp.float32(0.1))
        gradient, mean = matching_gradient(x, 0.9 * x, 1.1 * x)
        return matching_loss(restore_norm(x, noise), gradient).mean() + mean.mean()

    params = {"scale": jnp.float32(0.3), "offset": jnp.float32(-0.2)}
    run = jax.jit(jax.value_and_grad(measured))
    expected = run(params, noise, jnp.int32(2))
    with jax.set_mesh(make_mesh(data=4, seq=2)):
        spread = jax.device_put(noise, P("data"))
        assert jax.typeof(per_example(sigmas[0], spread)).sharding.spec == P("data")  # as the examples are
        got = run(params, spread, jnp.int32(2))
    for one, two in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5)


def test_the_critics_loss_is_least_at_the_velocity_of_what_the_student_makes():
    """Eq. 6, over many draws: any other mean or spread is worse."""
    shape, (mean, spread) = (20_000, 1, 1, 1, 1), (-0.4, 0.5)
    made, noise = mean + spread * normal(0, shape), normal(1, shape)
    sigma = jax.random.uniform(jax.random.key(2), shape[:1], minval=0.05, maxval=0.95)

    def loss(mean, spread):
        return float(base_loss(squared_error(partial(gaussian, mean, spread), made, noise, sigma, None)).mean())

    least = loss(mean, spread)
    for other in ((-0.3, 0.5), (-0.5, 0.5), (-0.4, 0.6), (-0.4, 0.4)):
        assert loss(*other) > least + 1e-4
    target = velocity_target(made, noise)
    assert least == pytest.approx(
        float(jnp.square(target - gaussian(mean, spread, add_noise(made, noise, sigma), sigma)).mean())
    )


def test_a_student_of_one_dimension_becomes_the_data():
    """Mean and spread of its samples: the critic is exact at every step, as one that has been trained to the end."""
    real_mean, real_spread, shape = 1.5, 0.6, (512, 1, 1, 1, 1)
    sigmas = sigma_schedule(2, 1.0)
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, 1500), b1=0.0)
    params = {"mean": jnp.float32(-1.0), "spread": jnp.float32(1.4)}

    def student(params, x, sigma, conditions):
        return gaussian(params["mean"], params["spread"], x, sigma)

    def loss(params, key):
        keys = jax.random.split(key, 4)
        step = jax.random.randint(keys[0], (), 0, 2)
        x = roll_out(jax.tree_util.Partial(student, params), jax.random.normal(keys[1], shape), sigmas, step, None)
        made = jax.lax.stop_gradient(x)
        sigma = matching_sigma(keys[2], shape[:1], 1.0)
        noised = add_noise(made, jax.random.normal(keys[3], shape), sigma)
        fake = clean_from_velocity(noised, gaussian(made.mean(), made.std(), noised, sigma), sigma)
        real = clean_from_velocity(noised, gaussian(real_mean, real_spread, noised, sigma), sigma)
        return matching_loss(x, matching_gradient(x, fake, real)[0]).mean()

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(0), 1500)
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules
        (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((params, optimizer.init(params)))
    noise = normal(5, (20_000, 1, 1, 1, 1))
    for last in (0, 1):
        samples = roll_out(jax.tree_util.Partial(student, params), noise, sigmas, last, None)
        assert float(samples.mean()) == pytest.approx(real_mean, abs=0.05)
    assert float(samples.std()) == pytest.approx(real_spread, abs=0.08)


def test_a_restored_norm():
    plain, guided = normal(0), 3 * normal(1)
    np.testing.assert_allclose(restore_norm(guided, plain).std((1, 2, 3, 4)), plain.std((1, 2, 3, 4)), rtol=1e-4)
    np.testing.assert_array_equal(restore_norm(guided, plain, 0.0), guided)
