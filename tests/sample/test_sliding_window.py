"""The sampler's laws, on velocities whose answer is known."""

import dataclasses
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_sampling import MEAN, SIGMAS, SPREAD, entangled, gaussian, noise, told

from mi_jax.conditions import Windowed
from mi_jax.diffusion import euler_step, sigma_schedule
from mi_jax.mesh import make_mesh
from mi_jax.sample.guidance import Guidance
from mi_jax.sample.sliding_window import sliding_window
from mi_jax.sample.windows import blend_weights, plan_windows


def frame_by_frame(latents, sigma, conditions):
    """Depends on a frame's own latents and sound alone, so windows change nothing."""
    audio = conditions.audio.mean((1, 3, 4)).reshape(*latents.shape[:2], 1, 1, 1)
    return jnp.sin(2 * latents) + audio


@partial(jax.jit, static_argnums=0)
def plain_euler(velocity, x, sigmas, conditions):
    for sigma, sigma_next in pairwise(sigmas):
        x = euler_step(x, velocity(x, jnp.full(x.shape[0], sigma), conditions), sigma, sigma_next)
    return x


@pytest.mark.parametrize(("length", "window"), [(9, 9), (7, 9), (1, 9)])
def test_one_window_that_covers_all_is_plain_euler(length, window):
    sampled = sliding_window(entangled, noise(length, 2), SIGMAS, told(length, 2), window=window, overlap=3)
    np.testing.assert_allclose(sampled, plain_euler(entangled, noise(length, 2), SIGMAS, told(length, 2)), atol=1e-6)


@pytest.mark.parametrize(("length", "overlap"), [(23, 3), (31, 8)])
def test_windows_do_not_show_when_frames_are_independent(length, overlap):
    sampled = sliding_window(frame_by_frame, noise(length), SIGMAS, told(length), window=9, overlap=overlap)
    np.testing.assert_allclose(sampled, plain_euler(frame_by_frame, noise(length), SIGMAS, told(length)), atol=1e-5)


@pytest.mark.parametrize("group", [2, 3, 100])
def test_the_group_size_changes_nothing(group):
    def sample(group):
        return sliding_window(entangled, noise(31, 2), SIGMAS[:3], told(31, 2), window=9, overlap=4, group=group)

    one, several = sample(1), sample(group)
    np.testing.assert_allclose(several, one, atol=1e-6)


def test_one_level_is_the_weighted_sum_of_the_windows_each_with_its_own_conditions():
    length, conditions, x = 20, told(20), noise(20)
    starts = plan_windows(length, 9, 4)
    expected = np.zeros(x.shape)
    for start, weight in zip(starts, blend_weights(starts, 9, length)):
        u = entangled(x[:, start : start + 9], jnp.full(1, SIGMAS[0]), conditions.window(int(start), 9))
        expected[:, start : start + 9] += weight.reshape(1, -1, 1, 1, 1) * np.asarray(u)
    sampled = sliding_window(entangled, x, SIGMAS[:2], conditions, window=9, overlap=4)
    np.testing.assert_allclose(sampled, x + (SIGMAS[1] - SIGMAS[0]) * expected, atol=1e-5)


def test_only_the_first_window_starts_the_video():
    def starts_only(latents, sigma, conditions):
        return jnp.ones_like(latents) * conditions.is_start.reshape(-1, 1, 1, 1, 1)

    moved = sliding_window(starts_only, noise(14), jnp.asarray([1.0, 0.0]), told(14), window=9, overlap=4) - noise(14)
    ramp = [1] * 5 + [1, 1, 0.5, 0] + [0] * 5  # window 0 fades out over frames 5..8
    np.testing.assert_allclose(moved[0, :, 0, 0, 0], -np.asarray(ramp), atol=1e-6)


def test_gaussian_data_is_sampled_to_its_mean_and_spread():
    """For data N(m, s^2) the exact velocity is linear in x, and its flow carries noise eps to m + s * eps."""
    mean, spread = 0.7, 0.3

    def exact(latents, sigma, conditions):
        sigma = sigma.reshape(-1, 1, 1, 1, 1)
        variance = (1 - sigma) ** 2 * spread**2 + sigma**2
        centred = latents - (1 - sigma) * mean
        return (sigma - (1 - sigma) * spread**2) / variance * centred - mean

    x = noise(40)
    sampled = sliding_window(exact, x, sigma_schedule(400, 1.0), told(40), window=9, overlap=4)
    np.testing.assert_allclose(sampled, mean + spread * x, atol=0.01)

    def point(latents, sigma, conditions):
        return (latents - mean) / sigma.reshape(-1, 1, 1, 1, 1)

    exactly = sliding_window(point, x, SIGMAS, told(40), window=9, overlap=4)
    np.testing.assert_allclose(exactly, jnp.full_like(x, mean), atol=1e-5)


def test_noise_levels_compose():
    args = {"window": 9, "overlap": 4, "group": 2}
    whole = sliding_window(entangled, noise(23), SIGMAS, told(23), **args)
    x = noise(23)
    for i in range(len(SIGMAS) - 1):
        x = sliding_window(entangled, x, SIGMAS[i : i + 2], told(23), **args)
    np.testing.assert_allclose(x, whole, atol=1e-6)


def test_it_traces_once_and_a_seed_is_a_video():
    sample = jax.jit(lambda x, sigmas, c: sliding_window(entangled, x, sigmas, c, window=9, overlap=4))
    first = sample(noise(23), SIGMAS, told(23))
    np.testing.assert_array_equal(first, sample(noise(23), SIGMAS, told(23)))
    assert not np.allclose(first, sample(noise(23, seed=1), SIGMAS, told(23)), atol=0.1)
    assert sample._cache_size() == 1


@pytest.mark.parametrize(("group", "guidance"), [(1, Guidance()), (4, Guidance()), (8, Guidance(audio=2.0, text=1.0))])
def test_one_device_and_eight_give_the_same_video(guidance, group):
    layouts = []

    def velocity(latents, sigma, conditions):
        layouts.append(jax.typeof(latents).sharding.spec[0])
        return entangled(latents, sigma, conditions)

    @jax.jit
    def sample(x, conditions):
        return sliding_window(guidance(velocity), x, SIGMAS[:3], conditions, window=9, overlap=4, group=group)

    alone = sample(noise(42), told(42))
    with jax.set_mesh(make_mesh(data=4, seq=2)):
        spread = sample(noise(42), told(42))
    np.testing.assert_allclose(spread, alone, atol=1e-5)
    assert layouts == [None, "data" if group >= 4 else None]


@pytest.mark.parametrize("frames", [9, 14, 23])
def test_fewer_windows_than_devices_are_shared_out(frames):
    """1, 2 and 4 windows on 8 devices: one each, not all of them on all."""
    seen = []

    def velocity(latents, sigma, conditions):
        seen.append((jax.typeof(latents).sharding.spec[0], latents.shape[0]))
        return entangled(latents, sigma, conditions)

    @partial(jax.jit, static_argnames="group")
    def sample(x, conditions, group):
        return sliding_window(velocity, x, SIGMAS[:3], conditions, window=9, overlap=4, group=group)

    alone = sample(noise(frames), told(frames), group=1)
    with jax.set_mesh(make_mesh(data=8)):
        spread = sample(noise(frames), told(frames), group=8)
    np.testing.assert_allclose(spread, alone, atol=1e-5)
    assert seen == [(None, 1), ("data", 8)]


def test_branches_of_guidance_share_the_devices_too():
    """Two branches of a window that is alone in its group, over two devices."""
    seen = []

    def velocity(latents, sigma, conditions):
        seen.append((jax.typeof(latents).sharding.spec[0], latents.shape[0]))
        return entangled(latents, sigma, conditions)

    @jax.jit
    def sample(x, conditions):
        guided = Guidance(audio=2.0)(velocity)
        return sliding_window(guided, x, SIGMAS[:3], conditions, window=9, overlap=4, group=1)

    alone = sample(noise(14), told(14))
    with jax.set_mesh(make_mesh(data=2, seq=4)):
        spread = sample(noise(14), told(14))
    np.testing.assert_allclose(spread, alone, atol=1e-5)
    assert seen == [(None, 2), ("data", 2)]


def test_a_group_is_filled_up_as_far_as_its_branches_need():
    """One window and two branches on four devices: the window twice, not once on all of them."""
    seen = []

    def velocity(latents, sigma, conditions):
        seen.append((jax.typeof(latents).sharding.spec[0], latents.shape[0]))
        return entangled(latents, sigma, conditions)

    with jax.set_mesh(make_mesh(data=4, seq=2)):
        guided = Guidance(audio=2.0)(velocity)
        sample = lambda x, c: sliding_window(guided, x, SIGMAS[:3], c, window=9, overlap=4, group=2)  # noqa: E731
        jax.jit(sample)(noise(9), told(9))
    assert seen == [("data", 4)]


# --- A sampler for other people's scripts: Gaussian data, whose velocity is known


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Means:
    """Conditions of one's own: a mean for every frame [b t]."""

    mean: jax.Array

    def window(self, start, length):
        return Means(jax.lax.dynamic_slice_in_dim(self.mean, start, length, axis=1))


FINE = sigma_schedule(64, 1.0)
SAMPLE = jax.jit(partial(sliding_window, gaussian, window=7, overlap=3, group=2))


def wide(length, b, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(3).normal(size=(b, length, 8, 8, 4)), dtype)


def test_latents_in_bf16_and_no_conditions_give_gaussian_data_too():
    sampled = SAMPLE(wide(15, 2, jnp.bfloat16), FINE, None)
    assert sampled.dtype == jnp.bfloat16
    values = np.asarray(sampled, np.float64)
    np.testing.assert_allclose([values.mean(), values.std()], [MEAN, SPREAD], rtol=0.06)


def test_conditions_of_ones_own_are_cut_with_the_windows():
    means = jnp.linspace(-2, 2, 15)[None].repeat(2, 0)
    sampled = SAMPLE(wide(15, 2), FINE, Means(means))
    np.testing.assert_allclose(np.asarray(sampled).mean((2, 3, 4)), means, atol=0.1)
    assert isinstance(Means(means), Windowed)
    assert isinstance(told(3), Windowed)


def test_it_is_a_function_to_grad_vmap_and_a_mesh():
    """The derivative by a shift of the mean is what is left of it after all levels: 1 - the noise's share of it."""
    x = wide(15, 1)
    shift = lambda m: SAMPLE(x, FINE, Means(jnp.full((1, 15), m))).mean()  # noqa: E731
    np.testing.assert_allclose(jax.grad(shift)(0.3), shift(1.3) - shift(0.3), rtol=1e-3)
    np.testing.assert_allclose(jax.grad(shift)(0.3), 1.0, atol=0.1)
    alone = SAMPLE(x, FINE, None)
    both = jax.vmap(lambda noise: SAMPLE(noise, FINE, None))(jnp.stack([x, -x]))
    np.testing.assert_allclose(both[0], alone, atol=1e-5)
    with jax.set_mesh(make_mesh()):
        spread = jax.jit(partial(sliding_window, gaussian, window=7, overlap=3, group=8))(x, FINE, None)
    np.testing.assert_allclose(spread, alone, atol=1e-5)
