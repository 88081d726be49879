"""Hidden states of a voice: whole, in chunks, from the disk, and while it is still arriving."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_avatar import draw_weights

from mi_jax.models.hidden_states import (
    HiddenStates,
    RunningMoments,
    RunningStates,
    first_conv_moments,
    hidden_states,
)
from mi_jax.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config, normalise

TINY = Wav2Vec2Config(
    conv_dim=16, width=32, num_layers=3, num_heads=4, mlp_width=64, position_kernel=8, position_groups=4
)


@jax.jit
def encode(model: Wav2Vec2, waveform: jax.Array) -> jax.Array:
    return model(waveform)


@pytest.fixture(scope="module")
def model() -> Wav2Vec2:
    return draw_weights(Wav2Vec2, TINY, 0)


@pytest.fixture(scope="module")
def voice() -> np.ndarray:
    """12 s that sound like nothing but vary in pitch and loudness as speech does, with a pause from 5 to 7 s."""
    rng = np.random.default_rng(0)
    time = np.arange(12 * 16_000) / 16_000
    tone = np.sin(2 * np.pi * (150 * time + 8 * np.sin(2 * np.pi * 0.7 * time)))
    loudness = np.abs(np.sin(2 * np.pi * 1.3 * time)) * ((time < 5) | (time > 7))
    return ((tone + 0.5 * rng.standard_normal(len(time))) * loudness * 0.1).astype(np.float32)


@pytest.mark.parametrize("num_samples", [1, 639, 640, 10_000, 12_800, 13_500])
def test_a_video_frame_owns_two_steps(model, voice, num_samples):
    """20 frames are 40 steps whatever the length; sound past the last step's 25 ms is cut, missing sound is silence."""
    waveform = voice[:num_samples]
    states = hidden_states(model, waveform, 20)
    assert states.shape == (40, TINY.num_hidden_states, TINY.width)
    expected = np.zeros(320 * 39 + 400, np.float32)
    expected[:num_samples] = normalise(waveform)[: len(expected)]
    np.testing.assert_allclose(states, encode(model, jnp.asarray(expected)[None])[0], atol=1e-5)


@pytest.mark.parametrize("at_a_time", [2**18, 1000])
def test_moments_from_the_signal_equal_those_of_the_convolution(model, voice, monkeypatch, at_a_time):
    monkeypatch.setattr("mi_jax.models.hidden_states.MOMENT_FRAMES", at_a_time)
    waveform = normalise(voice)
    output = np.asarray(model.convs[0](jnp.asarray(waveform)[None, :, None]), np.float64)[0]
    mean, variance = first_conv_moments(model, waveform)
    np.testing.assert_allclose(mean, output.mean(0), atol=1e-6)
    np.testing.assert_allclose(variance, output.var(0), rtol=1e-5)


def test_chunks_equal_the_whole_where_attention_is_local(model, voice):
    """With attention's output off a step depends on 8 steps of positional kernel alone: chunks are exact, pause and
    all."""
    local = nnx.clone(model)
    local.layers.out.kernel.set_value(jnp.zeros_like(local.layers.out.kernel[...]))
    whole = hidden_states(local, voice, 300)
    for chunk_seconds, context_seconds in ((4.0, 0.5), (3.14, 0.2)):
        chunked = hidden_states(local, voice, 300, chunk_seconds=chunk_seconds, context_seconds=context_seconds)
        np.testing.assert_allclose(chunked, whole, atol=2e-5)


def test_chunks_are_close_to_the_whole_with_attention(model, voice):
    """Attention in a random model spreads over all it sees, the worst case; state 0 (before attention) stays exact."""
    whole = hidden_states(model, voice, 300)
    chunked = hidden_states(model, voice, 300, chunk_seconds=6.0, context_seconds=1.0)
    np.testing.assert_allclose(chunked[:, 0], whole[:, 0], atol=2e-5)
    error = np.linalg.norm(chunked[:, -1] - whole[:, -1]) / np.linalg.norm(whole[:, -1])
    assert 0 < error <= 0.05


@pytest.mark.parametrize("seconds", [(20.0, 2.0), (4.0, 0.5)])
def test_states_are_read_where_they_are_asked_for(model, voice, tmp_path, seconds):
    """Of a sound on the disk, in any order; outside the signal they are zero."""
    options = dict(zip(("chunk_seconds", "context_seconds"), seconds))
    whole = hidden_states(model, voice, 280, **options)
    voice.tofile(tmp_path / "voice")
    states = HiddenStates(model, np.memmap(tmp_path / "voice", np.float32), 280, **options)
    for start, stop in ((100, 130), (550, 560), (-10, 20), (170, 400), (0, 560), (540, 600), (600, 610)):
        wanted = np.zeros((stop - start, *whole.shape[1:]), np.float32)
        inside = slice(max(start, 0), min(stop, 560))
        if inside.start < inside.stop:
            wanted[inside.start - start : inside.stop - start] = whole[inside]
        np.testing.assert_array_equal(states.read(start, stop), wanted)
    assert len(states._kept) <= 2


def test_sounds_with_silence_between_are_as_loud_as_alone(model, voice):
    """A minute of silence before changes nothing of what is heard later; two are normalised together."""
    local = nnx.clone(model)
    local.layers.out.kernel.set_value(jnp.zeros_like(local.layers.out.kernel[...]))  # attention would see the silence
    alone = HiddenStates(local, [(0, voice)], 300).read(100, 500)
    later = HiddenStates(local, [(60 * 16_000, voice)], 1800).read(3100, 3500)
    np.testing.assert_allclose(later, alone, atol=1e-4)
    halves = [(0, voice[:80_000]), (96_000, voice[80_000:])]
    apart = HiddenStates(local, halves, 325)
    np.testing.assert_allclose(apart.samples[:80_000], normalise(voice)[:80_000], atol=1e-4)
    assert not apart.samples[80_000:96_000].any()
    np.testing.assert_allclose(apart.samples[96_000:208_000], normalise(voice)[80_000:], atol=1e-4)
    cut = HiddenStates(local, [(0, voice), (16_000 * 20, voice)], 250)  # the second is behind the end
    np.testing.assert_allclose(cut.read(0, 400), HiddenStates(local, voice, 250).read(0, 400), atol=1e-2)


@pytest.mark.parametrize("piece", [777, 16_000])
def test_running_moments_are_those_of_the_whole(model, voice, piece):
    running = RunningMoments(10, 5)
    for first in range(0, len(voice), piece):
        running.add(voice[first : first + piece])
    mean, scale = running.loudness()
    np.testing.assert_allclose((voice - mean) / scale, normalise(voice), atol=2e-5)
    for ours, theirs in zip(running.of(model.convs[0]), first_conv_moments(model, normalise(voice)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_sound_that_arrives_is_heard_the_same_however_it_comes_in(model, voice):
    """And, once all is there, as the whole is: the last steps, of a sound that fits into a chunk."""
    reads = {}
    for piece in (320, 5_000, len(voice)):
        states, read, fed = RunningStates(model), [], 0
        for start in range(0, 600, 40):
            while states.num_steps < start + 40 and not states.ended:
                states.feed(voice[fed : fed + piece])
                fed += piece
                states.ended = fed >= len(voice)
            read.append(states.read(start, start + 40))
        reads[piece] = np.concatenate(read)
    np.testing.assert_array_equal(reads[320], reads[5_000])
    np.testing.assert_array_equal(reads[320], reads[len(voice)])
    whole = hidden_states(model, voice, 300)
    np.testing.assert_allclose(reads[320][-40:], whole[-40:], atol=2e-2)
    # Before, it was told by less sound: close, and the closer the more there was.
    error = np.linalg.norm(reads[320] - whole, axis=(1, 2)) / np.linalg.norm(whole, axis=(1, 2))
    assert error[400:].mean() < error[:200].mean()
    assert error[400:].mean() < 0.1


def test_sound_that_arrives_is_not_kept(model):
    states = RunningStates(model, chunk_seconds=2.0)
    rng = np.random.default_rng(0)
    for start in range(0, 1000, 40):
        while states.num_steps < start + 40:
            states.feed(rng.normal(size=3200).astype(np.float32))
        assert np.isfinite(states.read(start, start + 40)).all()
        assert len(states.samples) < 3 * 16_000
    with pytest.raises(ValueError, match="further back than is kept"):
        states.read(0, 10)
    with pytest.raises(ValueError, match="have arrived"):
        states.read(1000, 2000)
    states.ended = True
    assert not states.read(2000, 2010).any()


def test_chunks_must_hold_more_than_their_context(model, voice):
    with pytest.raises(ValueError, match="twice context_seconds"):
        hidden_states(model, voice, 300, chunk_seconds=2.0, context_seconds=1.0)


def test_there_must_be_sound_and_a_frame(model, voice):
    for waveform, frames in ((voice[:0], 5), (voice, 0)):
        with pytest.raises(ValueError, match="cannot give"):
            hidden_states(model, waveform, frames)
