"""wav2vec2's hidden states of a voice, two for each video frame, in bounded memory: of sound of any length, which may
lie on the disk, and of sound that is still arriving.

What the network takes from a whole signal, its loudness (`wav2vec2.normalise`) and the moments that the group norm
after the first convolution divides by, is known before the first chunk is encoded, or runs along with the sound.
"""

import copy
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mi_jax.models.wav2vec2 import Conv1d, Wav2Vec2
from mi_jax.rates import SAMPLE_RATE

MOMENT_FRAMES = 2**18
"""Frames that `first_conv_moments` holds at a time, 80 s of sound."""


def first_conv_moments(
    model: Wav2Vec2, *waveforms: "Float[np.ndarray, '_'] | NormalisedSound"
) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
    """Mean and variance over time of the first convolution's output, per channel, without computing that output.

    The output is linear in the k samples it sees, so the k x k covariance of the signal's frames gives both, in f64.
    """
    conv = model.convs[0]
    kernel = np.asarray(conv.kernel[...], np.float64)[:, 0]  # [k c]
    taps, frames = len(kernel), 0
    total, products = np.zeros(taps), np.zeros((taps, taps))
    for waveform in waveforms:
        count = (len(waveform) - taps) // conv.stride + 1
        frames += max(0, count)
        for first in range(0, count, MOMENT_FRAMES):
            last = min(first + MOMENT_FRAMES, count) - 1
            samples = waveform[first * conv.stride : last * conv.stride + taps].astype(np.float64)
            part = np.lib.stride_tricks.sliding_window_view(samples, taps)[:: conv.stride]
            total, products = total + part.sum(0), products + part.T @ part
    if not frames:  # shorter than one tap sees
        return jnp.zeros(kernel.shape[1]), jnp.ones(kernel.shape[1])
    mean = total / frames
    covariance = products / frames - np.outer(mean, mean)
    variance = np.einsum("ic,ij,jc->c", kernel, covariance, kernel)
    return jnp.asarray(mean @ kernel, jnp.float32), jnp.asarray(np.maximum(variance, 0), jnp.float32)


def filled_length(length: int, most: int, least: int = 8) -> int:
    """The next of a few lengths: `least` times a power of two, or `most`. A program of each is compiled once."""
    filled = least
    while filled < min(length, most):
        filled *= 2
    return min(filled, most)


class NormalisedSound:
    """Samples of sounds over all of which `normalise` has been together, each at its place, filled with silence (or
    cut) to `length`.

    They are computed where they are read, so that the sounds may be hours long and lie on the disk (`np.memmap`).
    """

    def __init__(self, sounds: Sequence[tuple[int, Float[np.ndarray, "_"]]], length: int):
        self.sounds, self.length = list(sounds), length
        count = sum(len(sound) for _, sound in self.sounds)
        mean = sum(_total(sound, lambda x: x) for _, sound in self.sounds) / count
        variance = sum(_total(sound, lambda x: np.square(x - mean)) for _, sound in self.sounds) / count
        self.mean, self.scale = np.float32(mean), np.float32(np.sqrt(variance + 1e-7))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, part: slice) -> Float[np.ndarray, "m"]:
        first, last, _ = part.indices(self.length)
        samples = np.zeros(max(0, last - first), np.float32)
        for start, sound in self.sounds:
            begin, end = max(first, start), min(last, start + len(sound))
            if begin < end:
                samples[begin - first : end - first] = (sound[begin - start : end - start] - self.mean) / self.scale
        return samples

    def heard(self) -> list["NormalisedSound"]:
        """Where there is sound, without the silence between."""
        parts = []
        for start, sound in self.sounds:
            part = copy.copy(self)
            part.sounds, part.length = [(0, sound)], max(0, min(len(sound), self.length - start))
            parts.append(part)
        return parts


def _total(waveform: np.ndarray, of: Callable, piece: int = 2**22) -> float:
    return sum(float(of(waveform[i : i + piece].astype(np.float64)).sum()) for i in range(0, len(waveform), piece))


@jax.jit
def _encode(model: Wav2Vec2, waveform: Array, moments: tuple[Array, Array], num_steps: Array) -> Array:
    return model(waveform[None], moments, num_steps)[0]


class HiddenStates:
    """Hidden states of a raw 16 kHz signal, computed where they are read: video frame f owns steps 2f and 2f + 1.

    Step n sees the samples of [20n, 20n + 25) ms before the transformer mixes them, so nothing is padded in front; the
    end is cut, or filled with silence, to make the count exact. The whole signal is normalised once.

    A signal of at most `chunk_seconds` is encoded whole, as the reference would. Behind its end it is filled up to the
    next of a few lengths, each compiled once; the filling is not seen. A longer one goes through in chunks of exactly
    `chunk_seconds` and in bounded memory, of which each gives the steps that have `context_seconds` of sound on both
    sides (the last chunk is moved back to end with the signal). All chunks share the whole signal's statistics at the
    group norm, so chunks differ from the whole only in how far attention sees.

    waveform: may lie on the disk; the last chunks alone are in memory. Or several sounds, each with the
      sample at which it begins: the silence between them counts neither for the normalisation nor for the statistics,
      since long silence would make the rest louder than it ever was.
    """

    def __init__(
        self,
        model: Wav2Vec2,
        waveform: Float[Array | np.ndarray, "n"] | Sequence[tuple[int, np.ndarray]],
        num_video_frames: int,
        *,
        chunk_seconds: float = 20.0,
        context_seconds: float = 2.0,
    ):
        if num_video_frames < 1 or not len(waveform):
            raise ValueError(f"{len(waveform)} samples cannot give the audio of {num_video_frames} video frames")
        hop, self.model, self.num_steps = model.config.hop, model, 2 * num_video_frames
        chunk, context = (round(seconds * SAMPLE_RATE / hop) for seconds in (chunk_seconds, context_seconds))
        if chunk <= 2 * context:
            raise ValueError(f"chunk_seconds ({chunk_seconds}) must exceed twice context_seconds ({context_seconds})")
        if isinstance(waveform, Sequence):
            self.samples = NormalisedSound(waveform, model.config.num_samples(self.num_steps))
            self.moments = first_conv_moments(model, *self.samples.heard())
        else:
            waveform = waveform if isinstance(waveform, np.ndarray) else np.asarray(waveform, np.float32)
            self.samples = NormalisedSound([(0, waveform)], model.config.num_samples(self.num_steps))
            self.moments = first_conv_moments(model, self.samples)
        self.chunk = min(self.num_steps, chunk)
        last = self.num_steps - self.chunk
        self.starts = np.array([*range(0, last, chunk - 2 * context), last])
        self.firsts = self.starts + np.where(self.starts > 0, context, 0)  # the step from which on a chunk is believed
        self.filled = filled_length(self.num_steps, chunk, 64)
        self._kept: dict[int, np.ndarray] = {}

    def read(self, start: int, stop: int) -> Float[np.ndarray, "s l d"]:
        """Steps `start` .. `stop - 1`; those outside the signal are zero."""
        config = self.model.config
        states = np.zeros((stop - start, config.num_hidden_states, config.width), np.float32)
        ends = [*self.firsts[1:], self.num_steps]
        number = max(0, int(np.searchsorted(self.firsts, start, side="right")) - 1)
        while number < len(ends) and self.firsts[number] < stop:
            first, end, offset = max(start, self.firsts[number]), min(stop, ends[number]), self.starts[number]
            if first < end:
                states[first - start : end - start] = self._encoded(number)[first - offset : end - offset]
            number += 1
        return states

    def _encoded(self, number: int) -> np.ndarray:
        if number not in self._kept:
            config = self.model.config
            first = int(self.starts[number]) * config.hop
            cut = self.samples[first : first + config.num_samples(self.filled)]
            cut = np.pad(cut, (0, config.num_samples(self.filled) - len(cut)))
            while len(self._kept) > 1:
                self._kept.pop(next(iter(self._kept)))
            encoded = _encode(self.model, jnp.asarray(cut), self.moments, jnp.int32(self.chunk))
            self._kept[number] = np.asarray(encoded)[: self.chunk]
        return self._kept[number]


def hidden_states(
    model: Wav2Vec2, waveform: Float[Array | np.ndarray, "n"], num_video_frames: int, **options: float
) -> Float[np.ndarray, "s l d"]:
    """All of `HiddenStates`: [2 * num_video_frames, L, D]. options: its `chunk_seconds` and `context_seconds`."""
    states = HiddenStates(model, waveform, num_video_frames, **options)
    return states.read(0, states.num_steps)


class RunningStates:
    """Hidden states of a sound that is still arriving, for `Voice.read` of ever later steps.

    What `HiddenStates` takes from the whole signal, its loudness and the first convolution's moments, is here that of
    the sound up to `context_seconds` behind the last step that is read: the same however it came in. Each read encodes
    at most the last `chunk_seconds`; no earlier sound is kept.
    """

    def __init__(self, model: Wav2Vec2, *, chunk_seconds: float = 20.0, context_seconds: float = 0.5):
        hop, self.model = model.config.hop, model
        self.chunk, self.context = (round(seconds * SAMPLE_RATE / hop) for seconds in (chunk_seconds, context_seconds))
        self.samples, self.first, self._new = np.zeros(0, np.float32), 0, []
        """The sound that is kept, and how much was forgotten before it; what came since."""
        self.ended = False
        self.moments = RunningMoments(len(model.convs[0].kernel[...]), model.convs[0].stride)

    @property
    def num_samples(self) -> int:
        """That have arrived."""
        return self.first + len(self.samples) + sum(map(len, self._new))

    @property
    def waiting(self) -> int:
        """Of these, those that no read has needed yet."""
        return self.num_samples - self.moments.count

    def feed(self, samples: Float[np.ndarray, "n"]) -> None:
        self._new.append(samples.astype(np.float32))

    @property
    def num_steps(self) -> int:
        """Steps that can be read: those with the context behind them, or at the end all."""
        if self.ended:
            return -(-self.num_samples // self.model.config.hop)
        return max(0, self.model.config.num_steps(self.num_samples) - self.context)

    def read(self, start: int, stop: int) -> Float[np.ndarray, "n l d"]:
        """Steps `start` .. `stop - 1`; those before the sound or behind its end are zero.

        Raises ValueError for steps that have not arrived, or that lie further back than is kept.
        """
        config = self.model.config
        self.samples, self._new = np.concatenate([self.samples, *self._new]), []
        states = np.zeros((stop - start, config.num_hidden_states, config.width), np.float32)
        first, last = max(start, 0), min(stop, self.num_steps)
        if stop > last and not self.ended:
            raise ValueError(f"steps up to {stop} are asked for, {last} have arrived")
        if first >= last:
            return states
        end = last + self.context  # what is heard, and counts for the moments
        end = min(end, self.num_steps) if self.ended else end
        self.moments.add(self._between(self.moments.count, min(config.num_samples(end), self.num_samples)))
        begin = max(0, end - self.chunk)
        if first < begin or begin * config.hop < self.first:
            raise ValueError(f"step {first} is asked for, further back than is kept")
        mean, scale = self.moments.loudness()
        filled = filled_length(end - begin, self.chunk, 64)
        cut = self._between(begin * config.hop, begin * config.hop + config.num_samples(filled))
        cut = np.pad((cut - mean) / scale, (0, config.num_samples(filled) - len(cut)))
        encoded = np.asarray(
            _encode(self.model, jnp.asarray(cut), self.moments.of(self.model.convs[0]), jnp.int32(end - begin))
        )
        states[first - start : last - start] = encoded[first - begin : last - begin]
        # A later read ends no earlier.
        kept = max(self.first, min(begin * config.hop, self.moments.count))
        self.samples, self.first = self.samples[kept - self.first :], kept
        return states

    def _between(self, start: int, stop: int) -> Float[np.ndarray, "n"]:
        """Samples that are kept."""
        return self.samples[max(0, start - self.first) : max(0, min(stop, self.num_samples) - self.first)]


class RunningMoments:
    """Mean, variance, and the moments of the first convolution's frames, of all samples added so far, in f64."""

    def __init__(self, taps: int, stride: int):
        self.taps, self.stride, self.count = taps, stride, 0
        self.sum, self.squares = 0.0, 0.0
        self.frames, self.total, self.products = 0, np.zeros(taps), np.zeros((taps, taps))
        self.rest = np.zeros(0)  # samples of frames that are not whole yet

    def add(self, samples: Float[np.ndarray, "n"]) -> None:
        samples = samples.astype(np.float64)
        self.count, self.sum = self.count + len(samples), self.sum + samples.sum()
        self.squares += np.square(samples).sum()
        rest = np.concatenate([self.rest, samples])
        if len(rest) >= self.taps:
            frames = np.lib.stride_tricks.sliding_window_view(rest, self.taps)[:: self.stride]
            self.frames += len(frames)
            self.total, self.products = self.total + frames.sum(0), self.products + frames.T @ frames
            rest = rest[len(frames) * self.stride :]
        self.rest = rest

    def loudness(self) -> tuple[np.float32, np.float32]:
        """What `normalise` subtracts, and divides by."""
        mean = self.sum / max(self.count, 1)
        variance = max(0.0, self.squares / max(self.count, 1) - mean**2)
        return np.float32(mean), np.float32(np.sqrt(variance + 1e-7))

    def of(self, conv: Conv1d) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
        """Mean and variance of its output over the samples, normalised, as `first_conv_moments`."""
        kernel = np.asarray(conv.kernel[...], np.float64)[:, 0]
        mean, scale = (float(x) for x in self.loudness())
        frames = max(self.frames, 1)
        centre = self.total / frames
        covariance = (self.products / frames - np.outer(centre, centre)) / scale**2
        variance = np.einsum("ic,ij,jc->c", kernel, covariance, kernel)
        average = (centre - mean) / scale
        return jnp.asarray(average @ kernel, jnp.float32), jnp.asarray(np.maximum(variance, 0), jnp.float32)
