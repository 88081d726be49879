"""The noise convention: closed forms and round trips."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_jax.diffusion import (
    add_noise,
    clean_from_velocity,
    euler_step,
    sample_sigma,
    shift_sigma,
    sigma_schedule,
    velocity_target,
)

SHAPE = (2, 3, 4, 5, 6)


@pytest.fixture(scope="module")
def pair():
    return tuple(jax.random.normal(jax.random.key(i), SHAPE) for i in (0, 1))


def test_ends_of_the_path(pair):
    clean, noise = pair
    np.testing.assert_array_equal(add_noise(clean, noise, jnp.zeros(2)), clean)
    np.testing.assert_array_equal(add_noise(clean, noise, jnp.ones(2)), noise)


def test_velocity_is_the_derivative_and_points_to_noise(pair):
    clean, noise = pair
    _, derivative = jax.jvp(lambda s: add_noise(clean, noise, s), (jnp.full(2, 0.3),), (jnp.ones(2),))
    np.testing.assert_allclose(derivative, velocity_target(clean, noise), rtol=1e-5, atol=1e-6)


def test_clean_from_velocity_inverts(pair):
    clean, noise = pair
    sigma = jnp.asarray([0.2, 0.9])
    got = clean_from_velocity(add_noise(clean, noise, sigma), velocity_target(clean, noise), sigma)
    np.testing.assert_allclose(got, clean, rtol=1e-4, atol=1e-5)


def test_euler_with_the_true_velocity_is_exact(pair):
    clean, noise = pair
    x, u = noise, velocity_target(clean, noise)
    sigmas = sigma_schedule(7, shift=5.0)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x = euler_step(x, u, sigma, sigma_next)
    np.testing.assert_allclose(x, clean, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(shift=st.floats(1.0, 17.0), sigma=st.floats(0.0, 1.0))
def test_shift_keeps_the_ends_raises_the_middle_and_inverts(shift, sigma):
    shifted = float(shift_sigma(jnp.float32(sigma), shift))
    assert -1e-6 <= shifted <= 1 + 1e-6
    assert shifted >= sigma - 1e-5
    assert float(shift_sigma(jnp.float32(shifted), 1 / shift)) == pytest.approx(sigma, abs=1e-3)


def test_schedule_values():
    """Shift 7, four steps: k s / (1 + (k - 1) s) of 1, .75, .5, .25, 0 (facts of HunyuanVideo's scheduler)."""
    expected = [1.0, 0.9545455, 0.875, 0.7, 0.0]
    np.testing.assert_allclose(sigma_schedule(4, 7.0), expected, atol=1e-6)
    with pytest.raises(ValueError, match="at least 1"):
        sigma_schedule(0, 1.0)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_training_sigmas_are_logit_normal_then_shifted(scale):
    sigma = np.asarray(sample_sigma(jax.random.key(0), (20_000,), 3.0, scale))
    unshifted = np.asarray(shift_sigma(jnp.asarray(sigma), 1 / 3.0))
    logit = np.log(unshifted / (1 - unshifted))
    assert abs(logit.mean()) < 0.03 * scale
    assert abs(logit.std() / scale - 1) < 0.03
