"""The losses in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.conditions import Conditions
from mi_jax.train.flow import adaptive_loss, base_loss, condition_dropout, motion_loss, region_area, squared_error

TOLD = Conditions(text_tokens=jnp.zeros((2, 1, 4)), text_mask=jnp.ones((2, 1), bool))


def test_the_true_velocity_has_no_error_and_its_negative_four_times_its_square():
    clean, noise = (jax.random.normal(jax.random.key(i), (2, 3, 4, 4, 5)) for i in (0, 1))
    sigma = jnp.asarray([0.1, 0.8])
    right = squared_error(lambda x, s, c: noise - clean, clean, noise, sigma, TOLD)
    np.testing.assert_allclose(right, 0, atol=1e-10)
    wrong = squared_error(lambda x, s, c: clean - noise, clean, noise, sigma, TOLD)
    np.testing.assert_allclose(base_loss(wrong), 4 * jnp.mean((noise - clean) ** 2, axis=(1, 2, 3, 4)), rtol=1e-5)


def test_the_network_sees_the_noised_latents():
    clean, noise = jnp.zeros((2, 1, 2, 2, 1)), jnp.ones((2, 1, 2, 2, 1))
    seen = []
    squared_error(lambda x, s, c: seen.append(x) or x, clean, noise, jnp.asarray([0.25, 0.5]), TOLD)
    np.testing.assert_allclose(seen[0][:, 0, 0, 0, 0], [0.25, 0.5])


def test_adaptive_loss_is_the_mean_over_the_face_whatever_its_size():
    error = jnp.ones((2, 3, 4, 4, 5)).at[:, :, 0, 0].set(7.0)
    region = jnp.zeros((2, 4, 4)).at[0, 0, 0].set(1.0).at[1].set(1.0)
    np.testing.assert_allclose(adaptive_loss(error, region), [7.0, 1 + 6 / 16], rtol=1e-6)
    np.testing.assert_allclose(adaptive_loss(error, jnp.zeros((2, 4, 4))), 0.0)


def test_adaptive_loss_scales_the_masked_sum_by_hw_over_area():
    """Eq. 3: (HW / sum M) x the mean of the masked error."""
    error = jax.random.uniform(jax.random.key(0), (1, 2, 4, 4, 3))
    region = (jax.random.uniform(jax.random.key(1), (1, 4, 4)) > 0.5).astype(jnp.float32)
    expected = np.mean(np.asarray(error) * np.asarray(region)[:, None, :, :, None]) * 16 / np.asarray(region).sum()
    np.testing.assert_allclose(adaptive_loss(error, region)[0], expected, rtol=1e-5)


def test_adaptive_loss_is_the_mean_over_all_that_a_moving_face_marks():
    """In time and space: one place of frame 0 and three of frame 2, (7 + 3 * 5) / 4; a frame without any has no say."""
    error = jnp.ones((2, 3, 4, 4, 5)).at[:, 0, 1, 1].set(7.0).at[:, 2, 0, :3].set(5.0).at[:, 1].set(100.0)
    region = jnp.zeros((2, 3, 4, 4)).at[0, 0, 1, 1].set(1.0).at[0, 2, 0, :3].set(1.0).at[1, 0, 1, 1].set(1.0)
    np.testing.assert_allclose(adaptive_loss(error, region), [(7 + 3 * 5) / 4, 7.0], rtol=1e-6)
    np.testing.assert_allclose(adaptive_loss(error, jnp.zeros((2, 3, 4, 4))), 0.0)


@pytest.mark.parametrize("scale", [1.0, 0.02])  # 0.02: less than one place in all
def test_a_region_that_is_repeated_for_every_frame_is_one_that_does_not_move(scale):
    error = jax.random.uniform(jax.random.key(0), (3, 5, 4, 4, 2))
    region = scale * jax.random.bernoulli(jax.random.key(1), 0.4, (3, 4, 4)).astype(jnp.float32).at[2].set(0.0)
    repeated = jnp.repeat(region[:, None], 5, axis=1)
    np.testing.assert_allclose(region_area(repeated), region_area(region), rtol=1e-6)
    np.testing.assert_allclose(adaptive_loss(error, repeated), adaptive_loss(error, region), rtol=1e-6)
    assert adaptive_loss(error, region)[2] == 0


def test_motion_loss_counts_places_by_how_far_they_are_from_the_portrait():
    """Two places that move by 1 and 3 while the others rest: (1 * 5 + 3 * 9) / 4, whatever the others' error."""
    portrait = jax.random.normal(jax.random.key(0), (2, 4, 4, 5))
    clean = jnp.repeat(portrait[:, None], 3, axis=1).at[0, 1, 2, 2].add(1.0).at[0, 2, 0, 3].add(-3.0)
    error = jnp.full((2, 3, 4, 4, 5), 100.0).at[0, 1, 2, 2].set(5.0).at[0, 2, 0, 3].set(9.0)
    np.testing.assert_allclose(motion_loss(error, clean, portrait), [8.0, 0.0], rtol=1e-5)


def test_motion_loss_is_the_mean_where_all_moves_alike():
    error = jax.random.uniform(jax.random.key(0), (2, 3, 4, 4, 5))
    clean = jnp.ones((2, 3, 4, 4, 5))
    np.testing.assert_allclose(motion_loss(error, clean, jnp.zeros((2, 4, 4, 5))), base_loss(error), rtol=1e-5)


def test_condition_dropout_rates():
    """Each part: 1 - (1 - 0.1)(1 - 0.05) = 0.145; all three: 0.05 + 0.95 * 0.001."""
    dropped = {name: np.asarray(x) for name, x in condition_dropout(jax.random.key(0), 40_000).items()}
    assert dropped.keys() == {"text", "image", "audio"}
    for x in dropped.values():
        assert abs(x.mean() - 0.145) < 0.006
    assert abs(np.logical_and.reduce(list(dropped.values())).mean() - 0.051) < 0.004
