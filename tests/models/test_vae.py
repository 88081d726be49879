"""The VAE against diffusers' HunyuanVideo VAE, and the laws that hold for any weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from flax import nnx
from reference import fill, numpy_tensors, relative_error

from mi_jax.errors import InputError
from mi_jax.models import tiling
from mi_jax.models.tiling import decode_latents, decode_pieces, decode_tiled, encode_latents, encode_tiled
from mi_jax.models.vae import VAE, VAEConfig, _fold, _match_channels, _unfold, upsample_nearest
from mi_jax.weights.hunyuan_vae import vae_table

SMALL = VAEConfig(
    widths=(8, 16, 16, 16),
    norm_groups=4,
    latent_channels=4,
    encoder_blocks=1,
    decoder_blocks=2,
    tile_size=32,
    tile_frames=16,
)
PUPPET = dataclasses.replace(VAEConfig.puppet(), widths=(12, 16, 16, 16), latent_channels=4, tile_frames=8)


def random_vae(config: VAEConfig, seed: int = 0) -> VAE:
    """Noise in every parameter, those initialised to zero included: scale 1 / sqrt(fan-in), norms around 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if leaf.ndim > 1:
            return jnp.asarray(noise / np.sqrt(np.prod(leaf.shape[:-1])))
        return jnp.asarray(0.1 * noise) + jnp.float32("scale" in str(path))

    graph, state = nnx.split(nnx.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


def clip(f, h, w, seed=1, b=1):
    return np.random.default_rng(seed).uniform(-1, 1, (b, f, h, w, 3)).astype(np.float32)


def to_torch(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x), -1, 1).copy())


def from_torch(x):
    return np.moveaxis(x.numpy(), 1, -1)


def reference_of(c: VAEConfig, seed: int = 1) -> AutoencoderKLHunyuanVideo:
    """diffusers' VAE of our config with noise in every parameter, as `random_vae`.

    With seed 0 one group's values are nearly equal, and the reference is 2e-5 away from itself in f64.
    """
    reference = AutoencoderKLHunyuanVideo(
        latent_channels=c.latent_channels,
        block_out_channels=c.widths,
        layers_per_block=c.encoder_blocks,
        norm_num_groups=c.norm_groups,
    ).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(float("norm" in name and "weight" in name), 0.1)
    return reference


@pytest.fixture(scope="module")
def reference():
    with torch.no_grad():
        yield reference_of(SMALL)


@pytest.fixture(scope="module")
def small(reference) -> VAE:
    return fill(lambda: VAE(SMALL, rngs=nnx.Rngs(0)), vae_table(SMALL), numpy_tensors(reference))


@pytest.fixture(scope="module")
def puppet() -> VAE:
    return random_vae(PUPPET)


encode = jax.jit(lambda vae, video: vae.encode(video))
decode = jax.jit(lambda vae, latents: vae.decode(latents))


@pytest.mark.parametrize(
    ("config", "count"), [(VAEConfig.hunyuan_video(), 246_478_803), (VAEConfig.puppet(), 7_791_104)]
)
def test_parameter_counts(config, count):
    vae = jax.eval_shape(lambda: VAE(config, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(vae))) == count


@pytest.mark.parametrize("config", [VAEConfig.hunyuan_video(), VAEConfig.puppet()], ids=["hunyuan", "puppet"])
def test_strides_are_4x8x8_in_both_directions(config):
    def shapes(video):
        vae = VAE(config, rngs=nnx.Rngs(0))
        mean, logvar = vae.encode(video)
        return mean, logvar, vae.decode(mean)

    mean, logvar, video = jax.eval_shape(shapes, jax.ShapeDtypeStruct((1, 9, 96, 64, 3), jnp.float32))
    assert mean.shape == logvar.shape == (1, 3, 12, 8, 16)
    assert video.shape == (1, 9, 96, 64, 3)


@pytest.mark.parametrize(
    ("f", "h", "w", "b", "seed"),
    [(1, 16, 16, 1, 1), (9, 24, 40, 1, 1), (33, 16, 24, 1, 1), (5, 40, 16, 2, 2), (9, 16, 24, 2, 3)],
)
def test_encode_and_decode_equal_the_reference(small, reference, monkeypatch, f, h, w, b, seed):
    if seed != 1:
        reference = reference_of(SMALL, seed)
        small = fill(lambda: VAE(SMALL, rngs=nnx.Rngs(0)), vae_table(SMALL), numpy_tensors(reference))
    for option in ("use_framewise_encoding", "use_framewise_decoding"):  # else 33 frames come in tiles
        monkeypatch.setattr(reference, option, False)
    video = clip(f, h, w, seed, b)
    posterior = reference.encode(to_torch(video)).latent_dist
    mean, logvar = encode(small, video)
    assert relative_error(mean, from_torch(posterior.mean)) < 1e-5
    assert relative_error(logvar, from_torch(posterior.logvar)) < 1e-5
    latents = np.array(mean)
    assert relative_error(decode(small, latents), from_torch(reference.decode(to_torch(latents)).sample)) < 1e-5


def tile_reference(reference, config, *, space):
    c = config
    reference.use_tiling = space
    reference.tile_sample_min_height = reference.tile_sample_min_width = c.tile_size
    reference.tile_sample_stride_height = reference.tile_sample_stride_width = int(c.tile_size * (1 - c.tile_overlap))
    reference.tile_sample_min_num_frames = c.tile_frames
    reference.tile_sample_stride_num_frames = int(c.tile_frames * (1 - c.tile_overlap))


@pytest.mark.parametrize(("f", "h", "w"), [(5, 40, 64), (29, 16, 16), (21, 32, 48)], ids=["space", "time", "both"])
def test_tiles_equal_the_reference(small, reference, f, h, w):
    tile_reference(reference, SMALL, space=True)
    video = clip(f, h, w)
    posterior = reference.encode(to_torch(video)).latent_dist
    mean, logvar = encode_tiled(small, video)
    assert relative_error(mean, from_torch(posterior.mean)) < 1e-5
    assert relative_error(logvar, from_torch(posterior.logvar)) < 1e-5
    assert relative_error(decode_tiled(small, mean), from_torch(reference.decode(to_torch(mean)).sample)) < 1e-5


def test_tiles_on_several_devices_are_the_same(small):
    """Of 2 x 3 tiles, three shapes: full ones, the last of a row, those of the last row."""
    latents = np.random.default_rng(0).standard_normal((1, 2, 5, 8, 4)).astype(np.float32)
    frames = np.concatenate(list(decode_pieces(small, latents, devices=jax.devices()[:3])), axis=1)
    np.testing.assert_allclose(frames, decode_tiled(small, latents), atol=1e-5)


def test_one_tile_that_covers_the_video_changes_nothing(puppet):
    video = clip(9, 24, 24)
    mean, logvar = encode(puppet, video)
    np.testing.assert_array_equal(encode_tiled(puppet, video)[0], mean)
    np.testing.assert_array_equal(encode_tiled(puppet, video)[1], logvar)
    np.testing.assert_array_equal(decode_tiled(puppet, np.asarray(mean)), decode(puppet, mean))


@pytest.mark.parametrize("t", range(1, 9))
def test_tiled_decoding_yields_every_frame_once(puppet, t):
    latents = np.random.default_rng(t).standard_normal((1, t, 2, 2, 4)).astype(np.float32)
    pieces = list(decode_pieces(puppet, latents))
    assert sum(piece.shape[1] for piece in pieces) == 4 * (t - 1) + 1
    assert max(piece.shape[1] for piece in pieces) <= PUPPET.tile_frames + 1


@pytest.mark.parametrize("kind", ["small", "puppet"])
def test_latents_that_come_in_chunks_are_the_same_video(kind, request):
    """Also where the last tile is filled up, and one program serves all lengths."""
    vae = request.getfixturevalue(kind)
    rng = np.random.default_rng(0)
    before = None
    for t in (17, 18, 23, 29):
        latents = rng.standard_normal((1, t, 2, 2, 4)).astype(np.float32)
        chunks = np.split(latents, sorted(rng.integers(0, t, 4)), axis=1)
        streamed = np.concatenate(list(tiling.decode_stream(vae, iter(chunks))), axis=1)
        if kind == "puppet":
            sizes = tiling._decode._cache_size()
            assert before in (None, sizes)
            before = sizes
        exact = tiling.Decoder(vae)
        exact.tiles.causal = False  # nothing is filled up
        whole = np.concatenate([*exact.push(latents), *exact.finish()], axis=1)
        if kind == "puppet":
            before = tiling._decode._cache_size()
        np.testing.assert_allclose(streamed, whole, atol=1e-5)
        assert streamed.shape[1] == 4 * t - 3


def test_decoding_is_taken_up_where_it_was_left(puppet):
    latents = np.random.default_rng(0).standard_normal((1, 29, 2, 2, 4)).astype(np.float32)
    whole = decode_tiled(puppet, latents)
    for left in (0, 1, 4, 17, 28):
        before, after = tiling.Decoder(puppet), tiling.Decoder(puppet)
        frames = list(before.push(latents[:, :left])) if left else []
        after.restore(before.state())
        frames += [*after.push(latents[:, left:]), *after.finish()]
        np.testing.assert_array_equal(np.concatenate(frames, axis=1), whole)


def test_frames_come_before_the_last_latents(puppet):
    asked = []

    def chunks():
        for _ in range(12):
            asked.append(1)
            yield np.zeros((1, 1, 2, 2, 4), np.float32)

    frames = tiling.decode_stream(puppet, chunks())
    _, _, tile, step = tiling._steps(PUPPET)
    assert next(frames).shape[1] == step + 1  # what the next tile does not fade into
    assert len(asked) == tile // 4 + 2  # a tile, and one more: there is a next


def test_scaled_latents_have_their_factor_and_come_back(puppet):
    video = clip(5, 16, 16)
    scaled = encode_latents(puppet, video)
    np.testing.assert_allclose(scaled, np.asarray(encode(puppet, video)[0]) * PUPPET.scaling_factor, rtol=1e-6)
    np.testing.assert_array_equal(scaled, jax.jit(VAE.encode_latents)(puppet, video))
    np.testing.assert_allclose(
        decode_latents(puppet, scaled), jax.jit(VAE.decode_latents)(puppet, scaled), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("f", "h", "w"), [(8, 16, 16), (5, 20, 16), (5, 16, 9)])
def test_a_video_off_the_grid_is_refused(puppet, f, h, w):
    with pytest.raises(InputError, match=f"{f} frames of {h}x{w}"):
        encode_tiled(puppet, clip(f, h, w))


def test_puppet_latents_see_no_later_frame(puppet):
    video = clip(13, 16, 16)
    mean = np.asarray(encode(puppet, video)[0])
    for k in range(3):
        changed = video.copy()
        changed[:, 4 * k + 1 :] = -changed[:, 4 * k + 1 :]
        again = np.asarray(encode(puppet, changed)[0])
        np.testing.assert_allclose(again[:, : k + 1], mean[:, : k + 1], atol=1e-5)
        assert np.abs(again[:, k + 1 :] - mean[:, k + 1 :]).max() > 1e-2


def test_the_first_puppet_latent_is_that_of_the_first_frame_alone(puppet):
    video = clip(9, 16, 24)
    np.testing.assert_allclose(encode(puppet, video[:, :1])[0], encode(puppet, video)[0][:, :1], atol=1e-5)


def test_puppet_frames_see_no_later_latent(puppet):
    latents = np.random.default_rng(0).standard_normal((1, 4, 2, 2, 4)).astype(np.float32)
    video = np.asarray(decode(puppet, latents))
    for k in range(3):
        changed = latents.copy()
        changed[:, k + 1 :] *= -1
        again = np.asarray(decode(puppet, changed))
        np.testing.assert_allclose(again[:, : 4 * k + 1], video[:, : 4 * k + 1], atol=1e-5)
        assert np.abs(again[:, 4 * k + 1 :] - video[:, 4 * k + 1 :]).max() > 1e-2


def test_a_fresh_vae_with_shortcuts_begins_as_an_autoencoder():
    vae = jax.jit(lambda: VAE(PUPPET, rngs=nnx.Rngs(0)))()
    grey = jnp.full((1, 1, 16, 16, 3), 0.5)
    mean, logvar = encode(vae, grey)
    assert float(jnp.abs(mean).max()) > 1e-3
    np.testing.assert_allclose(logvar, -6.0, atol=1e-6)


def test_shortcuts_average_pixels_of_one_colour():
    """4x4 pixels folded into 48 channels and matched to 3 are each colour's mean; matched back, it is everywhere."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 8, 4, 3)), jnp.float32)
    means = _match_channels(_fold(x, (1, 4, 4)), 3)
    expected = x.reshape(1, 1, 2, 4, 1, 4, 3).mean(axis=(3, 5))
    np.testing.assert_allclose(means, expected, atol=1e-6)
    np.testing.assert_array_equal(_unfold(_match_channels(means, 48), (1, 4, 4)), upsample_nearest(means, (1, 4, 4)))
    np.testing.assert_array_equal(_unfold(_fold(x, (1, 4, 4)), (1, 4, 4)), x)


def test_upsampling_repeats_all_but_the_first_frame_in_time():
    x = jnp.arange(3.0).reshape(1, 3, 1, 1, 1)
    y = upsample_nearest(x, (2, 1, 2))
    assert y.shape == (1, 5, 1, 2, 1)
    np.testing.assert_array_equal(y[0, :, 0, :, 0], np.array([[0, 0], [1, 1], [1, 1], [2, 2], [2, 2]]))


def test_bf16_runs_in_bf16(puppet):
    video = clip(5, 16, 16)
    mean = encode(puppet, jnp.asarray(video, jnp.bfloat16))[0]
    assert mean.dtype == jnp.bfloat16
    assert relative_error(np.asarray(mean, np.float32), encode(puppet, video)[0]) < 0.1
