"""wav2vec2 against the PyTorch reference, and the laws of its use on long audio."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from reference import fill, numpy_tensors

from mi_jax.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config, normalise
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
