"""The audio windows against a plain loop; the resampler's promises: local, shift-invariant, placed by its positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from mi_jax.models.audio_encoder import (
    AudioEncoder,
    AudioEncoderConfig,
    audio_windows,
    cut_audio,
    token_positions,
)

TINY = AudioEncoderConfig(input_dim=32, layers=3, width=32, heads=2, depth=2)


@pytest.fixture(scope="module")
def encoder() -> AudioEncoder:
    return jax.jit(lambda key: AudioEncoder(TINY, rngs=nnx.Rngs(key)))(jax.random.key(0))


def random_hidden(num_video_frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2 * num_video_frames, 3, 32)).astype(np.float32)


def windows_of(hidden: np.ndarray, start: int = 0, length: int | None = None) -> jax.Array:
    """Those of latent frames `start` .. of a clip, by default all of them."""
    length = (len(hidden) - 2) // 8 + 1 if length is None else length
    return audio_windows(jnp.asarray(cut_audio(hidden, start, length)), jnp.float32(start == 0))


@pytest.mark.parametrize(("latent_frames", "start", "length"), [(1, 0, 1), (2, 0, 2), (5, 0, 5), (5, 1, 3), (5, 3, 2)])
def test_windows_equal_a_plain_loop(latent_frames, start, length):
    video_frames = 4 * (latent_frames - 1) + 1
    hidden = random_hidden(video_frames)
    expected = np.zeros((latent_frames, 4, 10, 3, 32), np.float32)
    for k in range(latent_frames):
        for j, frame in enumerate([0, 0, 0, 0] if k == 0 else range(4 * k - 3, 4 * k + 1)):
            for i, step in enumerate(range(2 * frame - 4, 2 * frame + 6)):
                if 0 <= step < len(hidden):
                    expected[k, j, i] = hidden[step]
    np.testing.assert_array_equal(windows_of(hidden, start, length), expected[start : start + length])
    assert cut_audio(hidden.astype(np.float16), start, length).dtype == np.float16


def test_a_frame_sees_100_ms_to_either_side():
    """Frame 3 of latent 2 is video frame 8: it is shown from 320 to 360 ms and hears 240 to 440 ms (+ 5 ms)."""
    steps = np.broadcast_to(np.arange(18, dtype=np.float32)[:, None, None], (18, 1, 1))
    windows = windows_of(steps)[..., 0, 0]
    assert windows[2, 3].tolist() == [12, 13, 14, 15, 16, 17, 0, 0, 0, 0]
    assert windows[1, 3].tolist() == list(range(4, 14))
    assert windows[0].tolist() == [[0, 0, 0, 0, 0, 1, 2, 3, 4, 5]] * 4


@pytest.mark.parametrize("num_steps", [0, 1, 8, 12])
def test_steps_must_be_those_of_4k_plus_1_frames(num_steps):
    with pytest.raises(ValueError, match="4k \\+ 1"):
        cut_audio(np.zeros((num_steps, 3, 32), np.float32), 0, 1)


def test_positions_are_a_quarter_frame_and_three_quarters_place():
    positions = token_positions(13, 768)
    assert positions.shape == (4, 10, 13, 768)
    temporal, place = positions[..., :192], positions[..., 192:]
    assert np.array_equal(temporal, np.broadcast_to(temporal[:, :1, :1], temporal.shape))
    assert np.array_equal(place, np.broadcast_to(place[:1], place.shape))
    # The place is counted step by step, hidden states within a step, from frequency pi down to pi / 130.
    index = 7 * 13 + 5
    angle = index * np.pi * 130.0 ** -(np.arange(288) / 287)
    np.testing.assert_allclose(place[0, 7, 5], np.concatenate([np.sin(angle), np.cos(angle)]), atol=1e-6)
    angle = 3 * np.pi * 4.0 ** -(np.arange(96) / 95)
    np.testing.assert_allclose(temporal[3, 0, 0], np.concatenate([np.sin(angle), np.cos(angle)]), atol=1e-6)


def test_shifting_the_windows_shifts_the_tokens(encoder):
    windows = windows_of(random_hidden(17))
    tokens = encoder(windows[None, None])
    assert tokens.shape == (1, 1, 5, 4, 32)
    np.testing.assert_allclose(encoder(windows[None, None, 1:4]), tokens[:, :, 1:4], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        encoder(jnp.roll(windows, 2, axis=0)), jnp.roll(tokens[0, 0], 2, axis=0), rtol=1e-5, atol=1e-5
    )


def test_tokens_change_only_with_their_own_windows(encoder):
    windows = windows_of(random_hidden(17))
    changed = encoder(windows.at[2, 1, 4].add(1.0)) != encoder(windows)
    assert np.flatnonzero(np.any(changed, axis=(1, 2))).tolist() == [2]


def test_speakers_do_not_hear_each_other(encoder):
    windows = jnp.stack([windows_of(random_hidden(5, seed)) for seed in (0, 1)])
    np.testing.assert_allclose(encoder(windows[None])[0, 1], encoder(windows[1]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [AudioEncoderConfig.base(), AudioEncoderConfig.puppet()], ids=["base", "puppet"])
def test_attention_starts_at_each_tokens_own_frame(config):
    """Token i starts as the sound of frame i: most of its attention lies there at init, where uniform is a quarter."""
    encoder = jax.jit(lambda key: AudioEncoder(config, rngs=nnx.Rngs(key)))(jax.random.key(0))
    sound = jax.random.normal(jax.random.key(1), (8, 4, 10, config.layers, config.input_dim))
    tokens = encoder.token_norm((sound + token_positions(config.layers, config.input_dim)[None]).astype(jnp.float32))
    block = jax.tree.map(lambda leaf: leaf[0], encoder.blocks)
    q = rearrange(block.query(block.query_norm(encoder.queries[...])), "a (h d) -> a h d", h=config.heads)
    k = rearrange(block.key(tokens), "b f w l (h d) -> b f w l h d", h=config.heads)
    scores = jnp.einsum("ahd,bfwlhd->bhafwl", q, k) / np.sqrt(q.shape[-1])
    attention = jax.nn.softmax(scores.reshape(*scores.shape[:3], -1)).reshape(scores.shape).mean((0, 1))
    own_frame = np.array([attention[i, i].sum() for i in range(4)])
    assert own_frame.mean() > 0.6, own_frame
    assert own_frame.min() > 0.45, own_frame
    # And within the windows it lies on the six steps (of ten) about the frame's own two.
    assert attention[:, :, 2:8].sum((1, 2, 3)).min() > 0.7


def test_half_precision_parameters_give_the_same_tokens(encoder):
    """Norms and softmax are f32 inside; the rest in bf16 costs a few per cent, and nothing is promoted on the way."""
    windows = windows_of(random_hidden(9))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), encoder)
    tokens, expected = half(windows.astype(jnp.float16)), encoder(windows)
    assert tokens.dtype == jnp.bfloat16
    error = jnp.linalg.norm(tokens.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    assert error < 0.05, error


def test_width_and_token_count_are_free():
    encoder = AudioEncoder(
        AudioEncoderConfig(input_dim=32, layers=3, width=48, tokens=6, heads=3, depth=1), rngs=nnx.Rngs(0)
    )
    assert encoder(windows_of(random_hidden(5))).shape == (2, 6, 48)


def test_windows_of_another_encoder_are_refused(encoder):
    with pytest.raises(ValueError, match="this encoder takes"):
        encoder(jnp.zeros((2, 4, 10, 5, 32)))
