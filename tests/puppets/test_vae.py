"""The VAE's objective: its terms in closed form, its data, and that a step reduces it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_avatar import draw_weights

from mi_jax.models.lpips import load_lpips, lpips
from mi_jax.models.vae import VAE, VAEConfig
from mi_jax.puppets.vae import VAEObjective, measure_scaling_factor, mouth_disc, mouths, psnr, to_unit, weighted_l1
from mi_jax.train.checkpoints import at_start
from mi_jax.train.objective import TrainConfig
from mi_jax.train.state import init_state, make_step, split_model
from mi_jax.train.turns import OptimizerConfig
from mi_jax.weights.native import save_model

TINY = dataclasses.replace(VAEConfig.puppet(), widths=(12, 16, 16, 16), latent_channels=4)
OBJECTIVE = VAEObjective(vae=TINY, batch_size=2, frames=5, size=32, seconds=0.68)


@pytest.fixture(scope="module")
def fresh() -> VAE:
    """As training begins, compiled as one program."""
    return jax.jit(OBJECTIVE.init)(jax.random.key(0))


def example(seed=0, b=2, f=5, size=32):
    rng = np.random.default_rng(seed)
    return {
        "video": np.repeat(np.repeat(rng.integers(0, 256, (b, f, size // 8, size // 8, 3), np.uint8), 8, 2), 8, 3),
        "mouth": np.tile(np.float32([0.05, 0.2, 0.5, 0.75]), (b, 1, f, 1)),
        "mask": np.ones((b, size, size), bool),
    }


def test_l1_of_a_constant_error_has_no_detail():
    target = jnp.zeros((2, 3, 4, 4, 3))
    weight = jax.random.uniform(jax.random.key(0), (2, 3, 4, 4, 1)) + 0.5
    pixels, detail = weighted_l1(target, target + jnp.float32(0.25), weight)
    np.testing.assert_allclose(pixels, 0.25, rtol=1e-6)
    np.testing.assert_allclose(detail, 0.0, atol=1e-7)


def test_detail_counts_the_edge_that_was_lost():
    """A step of 1 at column 2 of 4, smoothed away: one of three differences along width is wrong by 1, no other."""
    target = jnp.zeros((1, 2, 4, 4, 3)).at[:, :, :, 2:].set(1.0)
    pixels, detail = weighted_l1(target, jnp.zeros_like(target), jnp.ones((1, 2, 4, 4, 1)))
    np.testing.assert_allclose(pixels, 0.5, rtol=1e-6)
    np.testing.assert_allclose(detail, (1 / 3) / 3, rtol=1e-6)


def test_a_weighted_pixel_counts_in_proportion():
    weight = jnp.ones((1, 1, 2, 2, 1)).at[0, 0, 0, 0].set(5.0)
    target = jnp.zeros((1, 1, 2, 2, 3))
    heavy, _ = weighted_l1(target, target.at[0, 0, 0, 0].set(1.0), weight)
    light, _ = weighted_l1(target, target.at[0, 0, 1, 1].set(1.0), weight)
    np.testing.assert_allclose([heavy[0], light[0]], [5 / 8, 1 / 8], rtol=1e-6)


def test_mouth_disc_stands_on_the_mouth():
    mouth = np.float32([[[0.1, 0.2, 0.25, 0.75]]])
    disc = np.asarray(mouth_disc(jnp.asarray(mouth), (40, 40), 0.5))[0, 0]
    row, column = np.unravel_index(disc.argmax(), disc.shape)
    assert row in (29, 30)
    assert column in (9, 10)
    # The standard deviation is 0.5 x 0.2 of 40 pixels = 4; pixel (29, 13) is (0.5, 3.5) pixels from the centre.
    np.testing.assert_allclose(disc[29, 13], np.exp(-0.5 * (0.5**2 + 3.5**2) / 4**2), rtol=1e-5)
    assert disc[0, 39] < 1e-6


def test_psnr_of_known_errors():
    np.testing.assert_allclose(psnr(jnp.float32([4.0, 0.04, 0.004])), [0.0, 20.0, 30.0], atol=1e-5)


def test_loss_is_per_example_and_independent_of_the_others(fresh):
    batch, key, compiled = example(), jax.random.key(1), jax.jit(OBJECTIVE.loss)
    loss, scalars = compiled(fresh, batch, key)
    assert loss.shape == (2,)
    changed = {name: x.copy() for name, x in batch.items()}
    changed["video"][1] = 255 - changed["video"][1]
    again, _ = compiled(fresh, changed, key)
    np.testing.assert_allclose(again[0], loss[0], rtol=1e-5)
    assert abs(float(again[1] - loss[1])) > 1e-4
    total = scalars["pixels"] + OBJECTIVE.detail_weight * scalars["detail"] + OBJECTIVE.kl_weight * scalars["kl"]
    np.testing.assert_allclose(loss.mean(), total, rtol=1e-5)


@pytest.mark.long
def test_training_reduces_the_loss(fresh):
    graph, params = nnx.split(fresh)
    optimiser = optax.adamw(2e-3)
    batch = jax.tree.map(jnp.asarray, example())

    @jax.jit
    def step(params, state, key):
        def mean_loss(params):
            return OBJECTIVE.loss(nnx.merge(graph, params), batch, key)[0].mean()

        loss, gradient = jax.value_and_grad(mean_loss)(params)
        with jax.numpy_dtype_promotion("standard"):  # inside optax
            updates, state = optimiser.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimiser.init(params), []
    for key in jax.random.split(jax.random.key(1), 150):
        params, state, loss = step(params, state, key)
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.6 * losses[0]


def test_dataset_is_the_same_every_time_and_fits_the_loss():
    first, again = (iter(OBJECTIVE.dataset(3)) for _ in range(2))
    a, b = next(first), next(again)
    assert a["video"].shape == (2, 5, 32, 32, 3)
    assert a["video"].dtype == np.uint8
    assert a["mouth"].shape == (2, 2, 5, 4)
    assert a["mask"].shape == (2, 32, 32)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    assert np.abs(next(first)["video"].astype(int) - a["video"]).mean() > 1
    assert np.abs(next(iter(OBJECTIVE.dataset(4)))["video"].astype(int) - a["video"]).mean() > 1


def test_sample_shows_truth_beside_reconstruction(fresh):
    batch = example()
    sampled = jax.jit(OBJECTIVE.sample)(fresh, {"video": batch["video"]}, jax.random.key(1))
    picture = OBJECTIVE.show(jax.tree.map(np.asarray, sampled))["reconstruction"]
    assert picture.shape == (5, 64, 64, 3)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[:, 32:, :32], batch["video"][1])


def test_scaling_factor_gives_unit_latents(fresh):
    clips = [example(seed)["video"][0] for seed in range(3)]
    factor = measure_scaling_factor(fresh, clips)
    encode = jax.jit(lambda clip: fresh.encode(to_unit(clip))[0])
    means = np.concatenate([np.asarray(encode(clip[None])) for clip in clips])
    np.testing.assert_allclose(np.std(means * factor), 1.0, rtol=1e-4)
    with pytest.raises(ValueError, match="no clips"):
        measure_scaling_factor(fresh, [])


def test_latent_noise_is_drawn_per_example_up_to_its_bound():
    """What the decoder sees, told by a model whose decoder hands on its latents as pixels."""
    seen = []

    class Through(VAE):
        def __init__(self):
            pass

        def encode(self, video):
            return jnp.linspace(-1.0, 1.0, video.size).reshape(video.shape), jnp.full(video.shape, -30.0)

        def decode(self, latents):
            seen.append(latents)
            return latents

    told = {name: jnp.asarray(x) for name, x in example(b=6).items()}
    clean = Through().encode(to_unit(told["video"]))[0]
    dataclasses.replace(OBJECTIVE, latent_noise=0.3).loss(Through(), told, jax.random.key(0))
    levels = jnp.std(seen[0] - clean, axis=(1, 2, 3, 4)) / jnp.std(clean)
    assert 0.0 < float(levels.min()) < 0.15 < float(levels.max()) <= 0.305
    assert len(set(np.round(levels, 3).tolist())) == 6


class Identity(VAE):
    """Latents are pixels, so that the loss of what is decoded can be written down."""

    def __init__(self, wrong: float = 0.0):
        self.wrong = wrong

    def encode(self, video):
        return video, jnp.full(video.shape, -100.0)

    def decode(self, latents):
        return latents + self.wrong


def test_half_size_examples_are_judged_at_half_the_size():
    """A quarter of 4 examples is one: its latents and its video are both averaged over 2x2, so a perfect decoder owes
    nothing there, and one that is wrong by a constant owes that constant, of both sizes alike."""
    objective = dataclasses.replace(OBJECTIVE, half_size=0.25, kl_weight=0.0)
    batch = {name: jnp.asarray(x) for name, x in example(b=4).items()}
    loss, scalars = objective.loss(Identity(), batch, jax.random.key(0))
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)
    loss, scalars = objective.loss(Identity(0.25), batch, jax.random.key(0))
    np.testing.assert_allclose(loss, 0.25, rtol=1e-4)
    np.testing.assert_allclose(scalars["half_size"], 0.25, rtol=1e-4)
    all_whole, _ = dataclasses.replace(objective, half_size=0.0).loss(Identity(0.25), batch, jax.random.key(0))
    np.testing.assert_allclose(all_whole, loss, rtol=1e-4)


def test_the_perceptual_term_is_lpips_of_frames_of_each_example():
    """Still videos: whichever frames are drawn, the distance is that of the picture and what is decoded of it."""
    batch = {name: jnp.asarray(x) for name, x in example(b=2).items()}
    batch["video"] = jnp.repeat(batch["video"][:, :1], 5, axis=1)
    plain = dataclasses.replace(OBJECTIVE, kl_weight=0.0)
    both = dataclasses.replace(plain, perceptual_weight=0.5, perceptual_blocks=2)
    with_it, scalars = both.loss(Identity(0.1), batch, jax.random.key(0))
    without, _ = plain.loss(Identity(0.1), batch, jax.random.key(0))
    first = to_unit(batch["video"][:, 0])
    expected = lpips(first, first + 0.1, load_lpips(2))
    np.testing.assert_allclose(with_it - without, 0.5 * expected, rtol=1e-3)
    np.testing.assert_allclose(scalars["lpips"], expected.mean(), rtol=1e-3)


def test_both_mouths_count_and_an_absent_one_does_not():
    one = np.tile(np.float32([0.05, 0.2, 0.25, 0.75]), (1, 1, 1, 1))
    other = np.tile(np.float32([0.05, 0.2, 0.75, 0.75]), (1, 1, 1, 1))
    absent = np.zeros_like(one)
    disc = lambda m: np.asarray(mouth_disc(jnp.asarray(m[:, 0]), (40, 40), 0.5))  # noqa: E731
    both = mouths(jnp.asarray(np.concatenate([one, other], 1)), (40, 40), 0.5)
    np.testing.assert_allclose(both, np.maximum(disc(one), disc(other)), rtol=1e-6)
    alone = mouths(jnp.asarray(np.concatenate([one, absent], 1)), (40, 40), 0.5)
    np.testing.assert_allclose(alone, disc(one), rtol=1e-6)


def test_duets_are_drawn_with_both_mouths():
    objective = dataclasses.replace(OBJECTIVE, duets=0.9, batch_size=4)
    mouth = next(iter(objective.dataset(0)))["mouth"]
    assert mouth.shape == (4, 2, 5, 4)
    assert (mouth[:, 1, :, 1] > 0).all(axis=1).sum() >= 2


def test_larger_latents_do_not_outgrow_their_noise():
    """A model that writes latents `scale` times as large, and reads them so, has the same loss: its gradient is 0."""

    class Scaled(VAE):
        def __init__(self, scale):
            self.scale = scale

        def encode(self, video):
            return self.scale * video, jnp.full(video.shape, -30.0)

        def decode(self, latents):
            return latents / self.scale

    told = {name: jnp.asarray(x) for name, x in example(b=2).items()}
    objective = dataclasses.replace(OBJECTIVE, latent_noise=0.3, kl_weight=0.0)
    loss = lambda scale: objective.loss(Scaled(scale), told, jax.random.key(0))[0].mean()  # noqa: E731
    value, slope = jax.value_and_grad(loss)(jnp.float32(2.0))
    assert value > 1e-3
    assert abs(slope) < 1e-3 * value


@pytest.mark.long
def test_a_decoder_trained_alone_decodes_the_same_latents(tmp_path):
    """From a model folder, one step: what encodes keeps its bits, what decodes moves."""
    start = draw_weights(VAE, TINY, 7)
    save_model(tmp_path / "model", {"vae": start}, {}, dtype=np.float32)
    objective = dataclasses.replace(OBJECTIVE, init_from=str(tmp_path / "model"), decoder_only=True)
    config = TrainConfig(name="decoder", objective=objective, steps=1, optimizer=OptimizerConfig(learning_rate=1e-2))
    graph, params, frozen = split_model(at_start(objective, jax.random.key(0)), objective)
    assert {path[0] for path, _ in nnx.to_flat_state(params["model"])} == {"post_quant_conv", "decoder"}
    told = {name: jnp.asarray(x) for name, x in example(b=1, f=1, size=16).items()}
    state, _ = make_step(config, graph)(init_state(config, params, jax.random.key(1)), frozen, told)
    before, after = (dict(nnx.to_flat_state(tree)) for tree in (nnx.state(start), state.params["model"]))
    for path, leaf in nnx.to_flat_state(frozen):
        np.testing.assert_array_equal(leaf[...], before[path][...])
    moved = [path for path, leaf in after.items() if not np.array_equal(leaf[...], before[path][...])]
    assert len(moved) > 0.3 * len(after)  # behind a zero convolution nothing moves yet
