"""Pretraining of the puppets' wav2vec2: which phoneme is spoken, and where the lips are, at each of its 50 steps a
second.

The public wav2vec2 comes pretrained on real speech; the puppets' one learns here on their own voices, from espeak-ng's
true phoneme timings and the mouth tracks made of them. Every hidden state has linear heads of its own, since the
denoiser's audio encoder reads them all. The heads are dropped afterwards: `load_ema(run, objective).wav2vec2` is the
result.
"""

import dataclasses
from typing import Annotated, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import soxr
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from mi_jax.bounds import Batch, Share, Weight, Within, check_fields
from mi_jax.data.batches import batches
from mi_jax.errors import InputError
from mi_jax.mesh import gather_parameters
from mi_jax.models.stack import stack_layers
from mi_jax.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config, normalise
from mi_jax.puppets.speech import (
    PHONEME_CLASSES,
    Speech,
    mouth_track,
    phoneme_steps,
    sample_voice,
    speak,
)
from mi_jax.rates import FPS, SAMPLE_RATE
from mi_jax.train.checkpoints import start_from

MOUTH = ("opening", "width", "roundness")
_MOUTH_MEAN = np.array([0.36, 1.0, 0.2], np.float32)
_MOUTH_SCALE = np.array([0.29, 0.12, 0.25], np.float32)  # standard deviations over the training voices

_ECHO = 32  # samples


class PhonemeModel(nnx.Module):
    """wav2vec2 and, for each of its hidden states, one linear map to phoneme classes and mouth."""

    def __init__(self, config: Wav2Vec2Config, *, rngs: nnx.Rngs):
        outputs = len(PHONEME_CLASSES) + len(MOUTH)
        self.wav2vec2 = Wav2Vec2(config, rngs=rngs)
        self.heads = stack_layers(
            lambda rngs: nnx.Linear(config.width, outputs, rngs=rngs), config.num_hidden_states, rngs
        )

    def __call__(self, waveform: Float[Array, "b n"]) -> tuple[Float[Array, "b t l c"], Float[Array, "b t l m"]]:
        """Logits of the classes, and opening (0..1), width factor and roundness of the mouth, from each hidden
        state."""
        states = self.wav2vec2(normalise(waveform))
        outputs = jax.vmap(lambda head, x: head(x), in_axes=(0, 2), out_axes=2)(self.heads, states)
        logits, mouth = jnp.split(outputs, [len(PHONEME_CLASSES)], axis=-1)
        shape = (1, 1, 1, len(MOUTH))
        return logits, mouth * _MOUTH_SCALE.reshape(shape) + _MOUTH_MEAN.reshape(shape)


@dataclasses.dataclass(frozen=True)
class SpeechSource:
    """A Grain `RandomAccessDataSource`: puppets' speech without the pictures, made when asked for.

    A clip is played faster or slower by a factor drawn from `speed`, log-uniformly. That moves pitch and formants
    together, as smaller and larger speakers do: many more throats than espeak-ng has. split, throats: see
    `sample_voice`.

    Items: audio f32 [n] (just what `2 * frames` wav2vec2 steps need), phoneme int32 [2 * frames] and mouth f32
    [2 * frames, 3] (`MOUTH`) at the steps' middles, (n + 0.5) * 20 ms.
    """

    num_clips: int
    frames: int
    samples: int
    seed: int = 0
    split: str = "train"
    throats: str | None = None
    speed: tuple[float, float] = (1.0, 1.0)

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, int(self.split == "test"), int(index)]))
        voice = sample_voice(rng, self.split, self.throats)
        speed = float(np.exp(rng.uniform(*np.log(self.speed))))
        speech = speak(rng, voice, speed * self.samples / SAMPLE_RATE, self.split)
        speech = play_at(speech, speed, self.samples)
        track = mouth_track(speech, self.frames)
        frame_middle, step_middle = (np.arange(self.frames) + 0.5) / FPS, (np.arange(2 * self.frames) + 0.5) / (2 * FPS)
        return {
            "audio": speech.audio,
            "phoneme": phoneme_steps(speech.phonemes, self.frames),
            "mouth": np.stack([np.interp(step_middle, frame_middle, x) for x in track], -1).astype(np.float32),
        }


def play_at(speech: Speech, speed: float, samples: int) -> Speech:
    """`speech` played `speed` times as fast, cut or padded to `samples`; its phonemes keep to the sound."""
    if speed == 1.0:
        return speech
    # Rates are ratios here: a recording of rate 1 read at rate `speed`.
    audio = soxr.resample(speech.audio, speed, 1.0, quality="HQ")[:samples]
    audio = np.pad(audio, (0, samples - len(audio)))
    phonemes = [(start / speed, end / speed, kind) for start, end, kind in speech.phonemes]
    return dataclasses.replace(speech, audio=audio, phonemes=phonemes)


_Speed = Annotated[float, Within(0.1, 10)]
_Decibels = Annotated[float, Within(-300, 300)]
_Tilt = Annotated[float, Within(-1, 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhonemeObjective:
    """Cross-entropy of the phoneme class plus squared error of the mouth (in standard deviations), step by step.

    frames: video frames of a clip, two wav2vec2 steps each. last_weight: the last hidden state's share of the loss; the
    other states share the rest evenly. mouth_weight: of the squared error, relative to the cross-entropy.
    speed: range of the playing speed of training clips (`SpeechSource`).
    noise_decibels: range of the signal-to-noise ratio of the noise that is added, half of the time. tilt: range of `a`
    in x[n] - a x[n - 1], drawn for the voice and for the noise: dull (negative) to thin (positive) sound.
    echo: most that a random filter of 2 ms adds to the voice's samples, of their own size: other formants' strengths.
    split: whose voices and sentences are heard (`sample_voice`).
    init_from: a finished run whose model this one starts from.
    """

    wav2vec2: Wav2Vec2Config = dataclasses.field(default_factory=Wav2Vec2Config.puppet)
    batch_size: Batch = 8
    frames: Annotated[int, Within(1, 10_000)] = 125
    last_weight: Share = 0.6
    mouth_weight: Weight = 1.0
    speed: tuple[_Speed, _Speed] = (0.84, 1.2)
    noise_decibels: tuple[_Decibels, _Decibels] = (10.0, 50.0)
    tilt: tuple[_Tilt, _Tilt] = (-0.4, 0.9)
    echo: Annotated[float, Within(0, 100)] = 0.0
    split: Literal["train", "wide"] = "train"
    init_from: str | None = None

    def __post_init__(self):
        check_fields(self)
        for name in ("speed", "noise_decibels", "tilt"):
            low, high = getattr(self, name)
            if low > high:
                raise InputError(f"{name} ({low}, {high}): the lower end stands first")

    def init(self, key: Key[Array, ""]) -> PhonemeModel:
        return PhonemeModel(self.wav2vec2, rngs=nnx.Rngs(key))

    def warm_start(self, model: PhonemeModel) -> PhonemeModel:
        return model if self.init_from is None else start_from(model, self.init_from, "wav2vec2")

    def dataset(self, seed: int, share: int = 0, shares: int = 1) -> grain.MapDataset:
        """Clips that do not come again: any of a billion, in order, each with a voice and sentences of its own."""
        clips = grain.MapDataset.source(self._source(10**9, seed, self.split, self.speed))
        return batches(clips, self.batch_size, share, shares)

    def held_out(self, count: int, seed: int = 0) -> grain.MapDataset:
        """`count` clips of voices, variants and sentences that training never hears, in batches."""
        return grain.MapDataset.source(self._source(count, seed, "test", (1.0, 1.0))).batch(self.batch_size)

    def _source(self, count: int, seed: int, split: str, speed: tuple[float, float]) -> SpeechSource:
        samples = self.wav2vec2.num_samples(2 * self.frames)
        return SpeechSource(num_clips=count, frames=self.frames, samples=samples, seed=seed, split=split, speed=speed)

    def loss(
        self,
        model: PhonemeModel,
        batch: dict[str, Array | np.ndarray],
        key: Key[Array, ""],
        turn: str = "model",
        step: Array | int = 0,
    ) -> tuple[Float[Array, "b"], dict[str, Float[Array, ""]]]:
        """The loss of each clip; scalars: cross-entropy, accuracy and mouth error of the last hidden state."""
        model = gather_parameters(model)
        logits, mouth = model(self.augment(batch["audio"], key))
        entropy = cross_entropy(logits, batch["phoneme"]).mean(1)  # [b l]
        scale = jnp.asarray(_MOUTH_SCALE).reshape(1, 1, 1, -1)
        error = jnp.mean(jnp.square((mouth - batch["mouth"][:, :, None]) / scale), axis=(1, 3))  # [b l]
        others = self.wav2vec2.num_layers
        weights = np.array([(1 - self.last_weight) / others] * others + [self.last_weight], np.float32)
        loss = (entropy + self.mouth_weight * error) @ weights
        hits = jnp.argmax(logits[:, :, -1], axis=-1) == batch["phoneme"]
        scalars = {"cross_entropy": entropy[:, -1].mean(), "mouth_error": error[:, -1].mean(), "accuracy": hits.mean()}
        return loss, scalars

    def augment(self, audio: Float[Array, "b n"], key: Key[Array, ""]) -> Float[Array, "b n"]:
        """Another microphone and another room: spectral tilt, short echoes, and half of the time noise with a tilt of
        its own.

        The gain needs no augmentation: `normalise` takes it out.
        """
        tilt_key, noise_key, level_key, noisy_key, echo_key, size_key = jax.random.split(key, 6)
        low, high = self.tilt
        tilt = jax.random.uniform(tilt_key, (2, audio.shape[0], 1), minval=low, maxval=high)
        voice = _tilted(audio, tilt[0])
        if self.echo:
            size = jax.random.uniform(size_key, (audio.shape[0], 1), maxval=self.echo)
            fading = np.exp(-np.arange(_ECHO, dtype=np.float32) / 8)[None]
            taps = fading * jax.random.normal(echo_key, (audio.shape[0], _ECHO))
            taps *= size / jnp.sqrt(jnp.sum(taps**2, axis=1, keepdims=True))
            voice += jax.vmap(lambda x, h: jnp.convolve(x, h)[: x.shape[0]])(voice, taps)
        noise = _tilted(jax.random.normal(noise_key, audio.shape), tilt[1])
        decibels = jax.random.uniform(
            level_key, (audio.shape[0], 1), minval=self.noise_decibels[0], maxval=self.noise_decibels[1]
        )
        noisy = jax.random.bernoulli(noisy_key, 0.5, (audio.shape[0], 1))
        level = jnp.where(noisy, 10 ** (-decibels / 20), 0.0) * _rms(voice) / _rms(noise)
        return voice + level * noise


def cross_entropy(logits: Float[Array, "b t l c"], classes: Int[Array, "b t"]) -> Float[Array, "b t l"]:
    """Minus the log probability of the true class, by each hidden state."""
    chosen = jnp.take_along_axis(logits, classes[:, :, None, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def measure(model: PhonemeModel, batches) -> dict[str, float | list[float]]:
    """Quality over batches of unaltered clips (`PhonemeObjective.held_out`), pooled over all steps.

    Keys: accuracy of the phoneme class by the last hidden state; for each of `MOUTH` the Pearson correlation of the
    last state's prediction with the truth; accuracy_by_state and opening_by_state from the first hidden state to the
    last.
    """
    predict = jax.jit(lambda model, audio: model(audio))
    hits, mouths, truths = [], [], []
    for batch in batches:
        logits, mouth = (np.asarray(x) for x in predict(model, batch["audio"]))
        hits.append((logits.argmax(-1) == batch["phoneme"][:, :, None]).reshape(-1, logits.shape[2]))
        mouths.append(mouth.reshape(-1, *mouth.shape[2:]))
        truths.append(batch["mouth"].reshape(-1, len(MOUTH)))
    hit, mouth, truth = (np.concatenate(x) for x in (hits, mouths, truths))
    accuracy = hit.mean(0)
    correlation = np.array(
        [
            [np.corrcoef(mouth[:, state, k], truth[:, k])[0, 1] for k in range(len(MOUTH))]
            for state in range(hit.shape[1])
        ]
    )
    return {
        "accuracy": float(accuracy[-1]),
        **{name: float(correlation[-1, k]) for k, name in enumerate(MOUTH)},
        "accuracy_by_state": accuracy.tolist(),
        "opening_by_state": correlation[:, 0].tolist(),
    }


def _tilted(x: Float[Array, "b n"], a: Float[Array, "b 1"]) -> Float[Array, "b n"]:
    return x - a * jnp.pad(x, ((0, 0), (1, 0)))[:, :-1]


def _rms(x: Float[Array, "b n"]) -> Float[Array, "b 1"]:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=1, keepdims=True) + 1e-12)
