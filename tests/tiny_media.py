"""Sound whose truth is known, in files of any kind."""

import pathlib
import wave
from fractions import Fraction

import av
import numpy as np
import pytest


def speech_like(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """Noise through a one-pole low-pass, [n c] float32: broadband enough to show any shift in time."""
    samples = np.random.default_rng(0).normal(size=round(seconds * rate))
    smooth = np.convolve(samples, 0.9 ** np.arange(60), mode="same")
    return np.repeat((0.2 * smooth / np.abs(smooth).max())[:, None], channels, 1).astype(np.float32)


def encode_sound(
    path: pathlib.Path, codec: str, audio: np.ndarray, rate: int, layout: str, sample_format: str, start: float = 0.0
) -> None:
    """A file of one sound track, of samples [n c], that starts at `start` by the file's clock."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = layout
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio.reshape(1, -1)), format="flt", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, round(start * rate), Fraction(1, rate)
        for part in av.AudioResampler(format=sample_format).resample(frame):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))


def one_line(caught: pytest.ExceptionInfo, path: pathlib.Path) -> bool:
    """An error message of one line that names the file."""
    return "\n" not in str(caught.value) and str(path) in str(caught.value)


def write_wav(path: pathlib.Path, samples: np.ndarray, rate: int = 16000) -> None:
    """Whole numbers [n c] as they are, in a WAV file that names no places for its channels."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(samples.dtype.itemsize)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())


def lag_and_correlation(heard: np.ndarray, truth: np.ndarray, most: int = 40) -> tuple[int, float]:
    """By how many samples `heard` is late, and how well it then agrees."""
    n = min(len(heard), len(truth))
    inner = slice(200, n - 200)
    found = {k: np.corrcoef(np.roll(heard[:n], -k)[inner], truth[inner])[0, 1] for k in range(-most, most + 1)}
    lag = max(found, key=found.get)
    return lag, found[lag]
