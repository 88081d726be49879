"""Pretraining of the puppets' wav2vec2: data true to the speech, a loss that weighs what it says, measures on an
oracle."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mi_jax.models.wav2vec2 import Wav2Vec2Config
from mi_jax.puppets.phonemes import PhonemeModel, PhonemeObjective, SpeechSource, cross_entropy, measure, play_at
from mi_jax.puppets.speech import OPEN, PHONEME_CLASSES, SILENCE, Speech, sample_voice
from mi_jax.train.checkpoints import at_start

TINY = Wav2Vec2Config(
    conv_dim=16, width=32, num_layers=2, num_heads=2, mlp_width=64, position_kernel=8, position_groups=4
)
OBJECTIVE = PhonemeObjective(wav2vec2=TINY, batch_size=2, frames=25)


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    return OBJECTIVE.dataset(seed=3)[0]


def on_device(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(x) for name, x in batch.items()}


@pytest.fixture(scope="module")
def model() -> PhonemeModel:
    return jax.jit(OBJECTIVE.init)(jax.random.key(0))


def test_clips_hold_what_fifty_steps_need_and_come_out_the_same_every_time(batch):
    assert batch["audio"].shape == (2, 320 * 49 + 400)
    assert batch["phoneme"].shape == (2, 50)
    assert batch["mouth"].shape == (2, 50, 3)
    again = OBJECTIVE.dataset(seed=3)[0]
    assert all(np.array_equal(batch[name], again[name]) for name in batch)
    for other in (OBJECTIVE.dataset(seed=4)[0], OBJECTIVE.dataset(seed=3)[1], OBJECTIVE.held_out(2, seed=3)[0]):
        assert not np.array_equal(batch["audio"], other["audio"])


def test_truth_is_that_of_the_speech():
    """Lips are shut for m, b, p that last, and a pause is labelled silence and is quiet; both at the step's own
    time."""
    closed, opened, quiet, loud = [], [], [], []
    source = SpeechSource(num_clips=6, frames=75, samples=TINY.num_samples(150))
    for index in range(6):
        item = source[index]
        steps = item["audio"][: 320 * 150].reshape(150, 320)
        level = np.sqrt(np.mean(steps**2, axis=1)) / np.sqrt(np.mean(item["audio"] ** 2))
        silent, open_vowel = (item["phoneme"] == kind for kind in (SILENCE, OPEN))
        # Inside a run of equal labels: the mouth's smoothing and the sound's decay reach over the edges.
        inside = np.convolve(silent, np.ones(5), mode="same") == 5
        quiet.extend(level[inside])
        loud.extend(level[open_vowel])
        closed.extend(item["mouth"][inside, 0])
        opened.extend(item["mouth"][open_vowel, 0])
    assert np.median(quiet) < 0.1 * np.median(loud)
    assert np.mean(closed) < 0.15
    assert np.mean(opened) > 0.6


@pytest.mark.parametrize("speed", [0.84, 1.2])
def test_speech_played_faster_keeps_its_phonemes_on_the_sound(speed):
    """A 440 Hz tone labelled "a" within silence: frequency, onset and label move together."""
    time = np.arange(32_000) / 16_000
    tone = np.where((time > 0.6) & (time < 1.4), np.sin(2 * np.pi * 440 * time), 0).astype(np.float32)
    phonemes = [(0.0, 0.6, SILENCE), (0.6, 1.4, OPEN), (1.4, 2.0, SILENCE)]
    voice = sample_voice(np.random.default_rng(0), "train")
    speech = Speech(audio=tone, phonemes=phonemes, text="", voice=voice)
    samples = round(32_000 / speed)
    played = play_at(speech, speed, samples)
    assert played.audio.shape == (samples,)
    _, (start, end, _), _ = played.phonemes
    audible = np.flatnonzero(np.abs(played.audio) > 0.1) / 16_000
    np.testing.assert_allclose([audible[0], audible[-1]], [start, end], atol=2e-3)
    spectrum = np.abs(np.fft.rfft(played.audio[: samples // 2 * 2]))
    assert np.argmax(spectrum) * 16_000 / (samples // 2 * 2) == pytest.approx(440 * speed, abs=1)


def test_cross_entropy_equals_optax():
    logits = jax.random.normal(jax.random.key(0), (2, 5, 3, 7))
    classes = jax.random.randint(jax.random.key(1), (2, 5), 0, 7)
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.broadcast_to(classes[:, :, None], (2, 5, 3)))
    np.testing.assert_allclose(cross_entropy(logits, classes), expected, rtol=1e-5)


def test_ignorance_costs_log_16_and_one_variance(model):
    """Heads of zero say: all classes alike, the mouth at its mean. The mouth's error is then its variance, about
    one."""
    blind = nnx.clone(model)
    blind.heads.kernel.set_value(jnp.zeros_like(blind.heads.kernel[...]))
    large = PhonemeObjective(wav2vec2=TINY, batch_size=16, frames=50).dataset(seed=0)[0]
    loss, scalars = jax.jit(OBJECTIVE.loss)(blind, on_device(large), jax.random.key(0))
    assert loss.shape == (16,)
    np.testing.assert_allclose(scalars["cross_entropy"], np.log(len(PHONEME_CLASSES)), rtol=1e-5)
    assert 0.7 < scalars["mouth_error"] < 1.3
    np.testing.assert_allclose(loss.mean(), scalars["cross_entropy"] + scalars["mouth_error"], rtol=1e-5)


@pytest.mark.parametrize(("last_weight", "expected"), [(1.0, [0, 0, 1]), (0.5, [0.25, 0.25, 0.5])])
def test_each_state_weighs_its_share(model, batch, last_weight, expected):
    """The gradient at the class biases is the state's weight times (probability - frequency)."""
    objective = PhonemeObjective(wav2vec2=TINY, last_weight=last_weight, mouth_weight=0.0)

    @jax.jit
    def gradient_and_logits(model, batch, key):
        gradient = jax.grad(lambda model: objective.loss(model, batch, key)[0].mean())(model)
        return gradient.heads.bias[...], model(objective.augment(batch["audio"], key))[0]

    gradient, logits = gradient_and_logits(model, on_device(batch), jax.random.key(0))
    frequency = np.bincount(batch["phoneme"].ravel(), minlength=16) / batch["phoneme"].size
    excess = np.asarray(jax.nn.softmax(logits).mean((0, 1))) - frequency
    np.testing.assert_allclose(gradient[:, :16], np.array(expected)[:, None] * excess, atol=1e-6)


def test_gain_does_not_matter(model, batch):
    audio = jnp.asarray(batch["audio"])
    predict = jax.jit(lambda model, audio: model(audio))
    for one, other in zip(predict(model, audio), predict(model, 0.1 * audio), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-3)


def test_augmentation_adds_noise_of_the_stated_level():
    """Without tilt, what is added is white and 20 dB below the voice where it is there at all, which is half of the
    time."""
    objective = PhonemeObjective(wav2vec2=TINY, tilt=(0.0, 0.0), noise_decibels=(20.0, 20.0))
    voice = jax.random.normal(jax.random.key(0), (200, 4000))
    noise = jax.jit(objective.augment)(voice, jax.random.key(1)) - voice
    decibels = 20 * np.log10(np.sqrt(np.mean(np.square(noise), axis=1)) + 1e-9)
    noisy = decibels > -100
    np.testing.assert_allclose(decibels[noisy], -20, atol=0.3)
    assert 0.4 < noisy.mean() < 0.6


def test_tilt_is_a_first_difference():
    objective = PhonemeObjective(wav2vec2=TINY, tilt=(0.9, 0.9), noise_decibels=(300.0, 300.0))
    voice = jax.random.normal(jax.random.key(0), (3, 1000))
    expected = np.asarray(voice).copy()
    expected[:, 1:] -= 0.9 * np.asarray(voice)[:, :-1]
    np.testing.assert_allclose(objective.augment(voice, jax.random.key(1)), expected, atol=1e-5)


def test_echoes_are_a_filter_of_the_stated_size_and_length():
    """A click comes back as itself and a tail of 2 ms, of any size up to what is said; another one for every voice."""
    objective = PhonemeObjective(wav2vec2=TINY, tilt=(0.0, 0.0), noise_decibels=(300.0, 300.0), echo=0.7)
    click = jnp.zeros((200, 100)).at[:, 10].set(1.0)
    heard = np.array(objective.augment(click, jax.random.key(1)))
    heard[:, 10] -= 1.0
    assert np.abs(heard[:, :10]).max() < 1e-6
    assert np.abs(heard[:, 42:]).max() < 1e-6
    sizes = np.linalg.norm(heard, axis=1)
    assert sizes.max() <= 0.7 + 1e-5
    np.testing.assert_allclose([sizes.mean(), sizes.std()], [0.35, 0.7 / np.sqrt(12)], atol=0.05)


def test_a_run_goes_on_from_another(model, tmp_path, monkeypatch):
    monkeypatch.setattr("mi_jax.train.checkpoints._averages_of", lambda source: nnx.state(model))
    objective = PhonemeObjective(wav2vec2=TINY, init_from=str(tmp_path))
    started = at_start(objective, jax.random.key(7))
    chex.assert_trees_all_equal(*map(jax.tree.leaves, (started, model)))


def test_it_learns(model, batch):
    """Sixty steps down the gradient's signs on one batch: the loss falls to less than half of what it was."""
    graph, state = nnx.split(model)

    @jax.jit
    def step(state, batch, key):
        loss, gradient = jax.value_and_grad(
            lambda state: OBJECTIVE.loss(nnx.merge(graph, state), batch, key)[0].mean()
        )(state)
        return jax.tree.map(lambda x, g: x - 1e-3 * jnp.sign(g), state, gradient), loss

    losses = []
    for i in range(60):
        state, loss = step(state, on_device(batch), jax.random.key(i))
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.5 * losses[0], losses


class Oracle(PhonemeModel):
    """Reads the truth written into its "audio"; errs on one step in five, and sees the mouth inverted in state 0."""

    def __init__(self):
        pass

    def __call__(self, waveform):
        truth = waveform.reshape(waveform.shape[0], -1, 4)
        classes = truth[..., 0].astype(jnp.int32)
        wrong = jnp.arange(classes.shape[1])[None] % 5 == 0
        logits = jax.nn.one_hot(jnp.where(wrong, (classes + 1) % 16, classes), 16)
        mouth = jnp.stack([-truth[..., 1:], 2 * truth[..., 1:] + 1], axis=2)
        return jnp.stack([logits, logits], axis=2), mouth


def test_measures_of_an_oracle():
    rng = np.random.default_rng(0)
    phoneme, mouth = rng.integers(0, 16, (6, 50), dtype=np.int32), rng.random((6, 50, 3), dtype=np.float32)
    audio = np.concatenate([phoneme[..., None].astype(np.float32), mouth], axis=-1).reshape(6, -1)
    batches = [{"audio": audio[i : i + 2], "phoneme": phoneme[i : i + 2], "mouth": mouth[i : i + 2]} for i in (0, 2, 4)]
    result = measure(Oracle(), batches)
    assert result["accuracy"] == pytest.approx(0.8)
    np.testing.assert_allclose([result["opening"], result["width"], result["roundness"]], 1.0, atol=1e-6)
    np.testing.assert_allclose(result["opening_by_state"], [-1, 1], atol=1e-6)
    assert result["accuracy_by_state"] == pytest.approx([0.8, 0.8])
