"""wav2vec2 against the PyTorch reference, and the laws of its use on long audio."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from reference import fill, numpy_tensors

from mi_jax.models.wav2vec2 import (
    HiddenStates,
    RunningMoments,
    RunningStates,
    Wav2Vec2,
    Wav2Vec2Config,
    first_conv_moments,
    hidden_states,
    normalise,
)
from mi_jax.weights.wav2vec2 import wav2vec2_table

TINY = Wav2Vec2Config(
    conv_dim=16, width=32, num_layers=3, num_heads=4, mlp_width=64, position_kernel=8, position_groups=4
)


def reference_config(config: Wav2Vec2Config) -> transformers.Wav2Vec2Config:
    return transformers.Wav2Vec2Config(
        hidden_size=config.width,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_width,
        conv_dim=(config.conv_dim,) * len(config.conv_kernels),
        num_conv_pos_embeddings=config.position_kernel,
        num_conv_pos_embedding_groups=config.position_groups,
    )


@jax.jit
def encode(model: Wav2Vec2, waveform: jax.Array) -> jax.Array:
    return model(waveform)


@pytest.fixture(scope="module")
def pair() -> tuple[Wav2Vec2, transformers.Wav2Vec2Model]:
    return make_pair(0)


def make_pair(seed: int) -> tuple[Wav2Vec2, transformers.Wav2Vec2Model]:
    torch.manual_seed(seed)
    reference = transformers.Wav2Vec2Model(reference_config(TINY)).eval()
    with torch.no_grad():
        for parameter in reference.parameters():  # default norms and biases are 1 and 0, and would hide a mix-up
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = fill(lambda: Wav2Vec2(TINY, rngs=nnx.Rngs(0)), wav2vec2_table(TINY), numpy_tensors(reference))
    return model, reference


@pytest.fixture(scope="module")
def voice() -> np.ndarray:
    """12 s that sound like nothing but vary in pitch and loudness as speech does, with a pause from 5 to 7 s."""
    rng = np.random.default_rng(0)
    time = np.arange(12 * 16_000) / 16_000
    tone = np.sin(2 * np.pi * (150 * time + 8 * np.sin(2 * np.pi * 0.7 * time)))
    loudness = np.abs(np.sin(2 * np.pi * 1.3 * time)) * ((time < 5) | (time > 7))
    return ((tone + 0.5 * rng.standard_normal(len(time))) * loudness * 0.1).astype(np.float32)


@pytest.mark.parametrize(
    ("num_samples", "seed"), [(400, 0), (719, 0), (720, 0), (5_001, 0), (16_333, 0), (5_001, 1), (5_001, 2)]
)
def test_all_hidden_states_equal_the_reference(pair, num_samples, seed):
    model, reference = make_pair(seed) if seed else pair
    waveform = np.random.default_rng(num_samples).standard_normal((2, num_samples)).astype(np.float32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(waveform), output_hidden_states=True).hidden_states
    expected = np.stack([state.numpy() for state in expected], axis=2)
    states = np.asarray(encode(model, jnp.asarray(waveform)))
    assert states.shape == expected.shape == (2, TINY.num_steps(num_samples), TINY.num_hidden_states, TINY.width)
    for layer in range(TINY.num_hidden_states):
        error = np.linalg.norm(states[:, :, layer] - expected[:, :, layer]) / np.linalg.norm(expected[:, :, layer])
        assert error <= 1e-5, (layer, error)


def test_base_has_the_parameters_of_wav2vec2_base():
    model = jax.eval_shape(lambda: Wav2Vec2(Wav2Vec2Config.base(), rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    with torch.device("meta"):
        reference = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config())
    expected = sum(parameter.numel() for parameter in reference.parameters())
    assert expected == 94_371_712
    # Not ours: the 768 of the embedding that masks steps in pretraining, and the 128 gains folded into the positional
    # kernel.
    assert count == expected - 768 - 128
    assert Wav2Vec2Config.base().hop == 320
    assert Wav2Vec2Config.base().receptive_field == 400


def test_puppet_is_small():
    model = jax.eval_shape(lambda: Wav2Vec2(Wav2Vec2Config.puppet(), rngs=nnx.Rngs(0)))
    assert 800_000 <= sum(leaf.size for leaf in jax.tree.leaves(model)) <= 1_000_000


def test_normalise_equals_the_feature_extractor(voice):
    extractor = transformers.Wav2Vec2FeatureExtractor()
    for waveform in (voice + np.float32(0.3), voice * np.float32(1e-3)):
        expected = extractor(waveform, sampling_rate=16_000, return_tensors="np").input_values[0]
        np.testing.assert_allclose(normalise(waveform), expected, atol=2e-5)
        np.testing.assert_allclose(normalise(jnp.asarray(waveform)), expected, atol=2e-5)
    assert not np.any(normalise(np.zeros(1000, np.float32)))


@pytest.mark.parametrize("num_samples", [1, 639, 640, 10_000, 12_800, 13_500])
def test_a_video_frame_owns_two_steps(pair, voice, num_samples):
    """20 frames are 40 steps whatever the length; sound past the last step's 25 ms is cut, missing sound is silence."""
    model, _ = pair
    waveform = voice[:num_samples]
    states = hidden_states(model, waveform, 20)
    assert states.shape == (40, TINY.num_hidden_states, TINY.width)
    expected = np.zeros(320 * 39 + 400, np.float32)
    expected[:num_samples] = normalise(waveform)[: len(expected)]
    np.testing.assert_allclose(states, encode(model, jnp.asarray(expected)[None])[0], atol=1e-5)


def test_step_n_sees_the_sound_of_its_own_25_ms(pair):
    """Before the positional convolution, a change of samples [20n, 20n + 5) ms touches steps n - 1 and n alone."""
    model, _ = pair
    moments = (jnp.zeros(TINY.conv_dim), jnp.ones(TINY.conv_dim))

    @jax.jit
    def features(waveform):
        x = jax.nn.gelu(model.channel_norm(model.convs[0](waveform[None, :, None]), moments))
        for conv in model.convs[1:]:
            x = jax.nn.gelu(conv(x))
        return x[0]

    waveform = np.random.default_rng(1).standard_normal(TINY.num_samples(30)).astype(np.float32)
    changed = waveform.copy()
    changed[320 * 12 : 320 * 12 + 80] += 1
    touched = np.flatnonzero(np.any(features(waveform) != features(changed), axis=-1))
    assert touched.tolist() == [11, 12]
    changed = waveform.copy()
    changed[320 * 12 + 80 : 320 * 13] += 1
    assert np.flatnonzero(np.any(features(waveform) != features(changed), axis=-1)).tolist() == [12]


@pytest.mark.parametrize("at_a_time", [2**18, 1000])
def test_moments_from_the_signal_equal_those_of_the_convolution(pair, voice, monkeypatch, at_a_time):
    monkeypatch.setattr("mi_jax.models.wav2vec2.MOMENT_FRAMES", at_a_time)
    model, _ = pair
    waveform = normalise(voice)
    output = np.asarray(model.convs[0](jnp.asarray(waveform)[None, :, None]), np.float64)[0]
    mean, variance = first_conv_moments(model, waveform)
    np.testing.assert_allclose(mean, output.mean(0), atol=1e-6)
    np.testing.assert_allclose(variance, output.var(0), rtol=1e-5)


def test_chunks_equal_the_whole_where_attention_is_local(pair, voice):
    """With attention's output off a step depends on 8 steps of positional kernel alone: chunks are exact, pause and
    all."""
    model, _ = pair
    local = nnx.clone(model)
    local.layers.out.kernel.set_value(jnp.zeros_like(local.layers.out.kernel[...]))
    whole = hidden_states(local, voice, 300)
    for chunk_seconds, context_seconds in ((4.0, 0.5), (3.14, 0.2)):
        chunked = hidden_states(local, voice, 300, chunk_seconds=chunk_seconds, context_seconds=context_seconds)
        np.testing.assert_allclose(chunked, whole, atol=2e-5)


def test_chunks_are_close_to_the_whole_with_attention(pair, voice):
    """Attention in a random model spreads over all it sees, the worst case; state 0 (before attention) stays exact."""
    model, _ = pair
    whole = hidden_states(model, voice, 300)
    chunked = hidden_states(model, voice, 300, chunk_seconds=6.0, context_seconds=1.0)
    np.testing.assert_allclose(chunked[:, 0], whole[:, 0], atol=2e-5)
    error = np.linalg.norm(chunked[:, -1] - whole[:, -1]) / np.linalg.norm(whole[:, -1])
    assert 0 < error <= 0.05


@pytest.mark.parametrize("seconds", [(20.0, 2.0), (4.0, 0.5)])
def test_states_are_read_where_they_are_asked_for(pair, voice, tmp_path, seconds):
    """Of a sound on the disk, in any order; outside the signal they are zero."""
    options = dict(zip(("chunk_seconds", "context_seconds"), seconds))
    whole = hidden_states(pair[0], voice, 280, **options)
    voice.tofile(tmp_path / "voice")
    states = HiddenStates(pair[0], np.memmap(tmp_path / "voice", np.float32), 280, **options)
    for start, stop in ((100, 130), (550, 560), (-10, 20), (170, 400), (0, 560), (540, 600), (600, 610)):
        wanted = np.zeros((stop - start, *whole.shape[1:]), np.float32)
        inside = slice(max(start, 0), min(stop, 560))
        if inside.start < inside.stop:
            wanted[inside.start - start : inside.stop - start] = whole[inside]
        np.testing.assert_array_equal(states.read(start, stop), wanted)
    assert len(states._kept) <= 2


def test_sounds_with_silence_between_are_as_loud_as_alone(pair, voice):
    """A minute of silence before changes nothing of what is heard later; two are normalised together."""
    model, _ = pair
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
def test_running_moments_are_those_of_the_whole(pair, voice, piece):
    model, _ = pair
    running = RunningMoments(10, 5)
    for first in range(0, len(voice), piece):
        running.add(voice[first : first + piece])
    mean, scale = running.loudness()
    np.testing.assert_allclose((voice - mean) / scale, normalise(voice), atol=2e-5)
    for ours, theirs in zip(running.of(model.convs[0]), first_conv_moments(model, normalise(voice)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_sound_that_arrives_is_heard_the_same_however_it_comes_in(pair, voice):
    """And, once all is there, as the whole is: the last steps, of a sound that fits into a chunk."""
    reads = {}
    for piece in (320, 5_000, len(voice)):
        states, read, fed = RunningStates(pair[0]), [], 0
        for start in range(0, 600, 40):
            while states.num_steps < start + 40 and not states.ended:
                states.feed(voice[fed : fed + piece])
                fed += piece
                states.ended = fed >= len(voice)
            read.append(states.read(start, start + 40))
        reads[piece] = np.concatenate(read)
    np.testing.assert_array_equal(reads[320], reads[5_000])
    np.testing.assert_array_equal(reads[320], reads[len(voice)])
    whole = hidden_states(pair[0], voice, 300)
    np.testing.assert_allclose(reads[320][-40:], whole[-40:], atol=2e-2)
    # Before, it was told by less sound: close, and the closer the more there was.
    error = np.linalg.norm(reads[320] - whole, axis=(1, 2)) / np.linalg.norm(whole, axis=(1, 2))
    assert error[400:].mean() < error[:200].mean()
    assert error[400:].mean() < 0.1


def test_sound_that_arrives_is_not_kept(pair):
    states = RunningStates(pair[0], chunk_seconds=2.0)
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


def test_chunks_must_hold_more_than_their_context(pair, voice):
    with pytest.raises(ValueError, match="twice context_seconds"):
        hidden_states(pair[0], voice, 300, chunk_seconds=2.0, context_seconds=1.0)


def test_there_must_be_sound_and_a_frame(pair, voice):
    for waveform, frames in ((voice[:0], 5), (voice, 0)):
        with pytest.raises(ValueError, match="cannot give"):
            hidden_states(pair[0], waveform, frames)
