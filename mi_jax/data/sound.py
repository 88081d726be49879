"""What a voice is like before any model hears it: where it is silent, how loud it is, its cepstrum.

Loudness is lost to the models on purpose (`wav2vec2.normalise`), and with it the sign that there is nothing to hear: of
a recording that is all but silent they are told its noise, as loud as speech.
"""

import os
import tempfile
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from mi_jax.caches import has_home
from mi_jax.data import pieces
from mi_jax.rates import SAMPLE_RATE

SILENT_DB = -60.0
"""Loudness below which nothing is said: 16-bit sound has its last bit at -90, a quiet room's noise is about -65."""
QUIET_DB = -45.0
"""Loudness below which a voice is hard to tell from the noise around it. Recorded speech is at -30 to -15."""
TRIM_DB = 40.0
"""How far below a voice's loudest moment it counts as silent: speech spans about 30 dB."""
LONG_SILENCE = 1.0  # seconds at either end that are worth a word
LOST_DB = 20.0
"""How far a mix may lie below its loudest channel: a voice in one of two channels alone is at 6."""


def loudness(audio: Float32[np.ndarray, " n"], sample_rate: int = SAMPLE_RATE) -> float:
    """Loudness while there is sound, in dB of full scale (a sine of amplitude 1 has -3.01); -inf for digital silence.

    Mean power of blocks of 400 ms, gated as in ITU-R BS.1770: blocks below -70 dB do not count, nor those 10 dB below
    the mean of the others. So pauses do not make a voice quieter. Without that standard's K-weighting, which changes
    speech by about 1 dB.
    """
    block, hop = round(0.4 * sample_rate), round(0.1 * sample_rate)
    power = _levels(audio, block, hop).astype(np.float64) ** 2
    for gate in (lambda _: 1e-7, lambda mean: 0.1 * mean):
        power = power[power > gate(power.mean())]
        if not len(power):
            return -np.inf
    return float(10 * np.log10(power.mean()))


def trim_silence(audio: Float32[np.ndarray, " n"]) -> tuple[int, int]:
    """Samples (start, stop) between which there is sound, to about 50 ms; (0, 0) where there is none at all.

    Silent is what lies `TRIM_DB` below the loudest moment, or below `SILENT_DB`.
    """
    frame, hop = 1024, 256
    levels = _levels(audio, frame, hop, margin=frame // 2)
    reference = max(levels.max(), 10 ** ((SILENT_DB + TRIM_DB) / 20))
    heard = np.flatnonzero(_librosa().amplitude_to_db(levels, ref=reference, top_db=None) > -TRIM_DB)
    return (int(heard[0]) * hop, min(len(audio), int(heard[-1] + 1) * hop)) if len(heard) else (0, 0)


def mfcc(
    audio: Float32[np.ndarray, " n"], sample_rate: int = SAMPLE_RATE, *, coefficients: int = 13, hop: float = 0.01
) -> Float32[np.ndarray, "t {coefficients}"]:
    """Mel-frequency cepstral coefficients every `hop` seconds, of windows of 25 ms; row i is centred on i x hop."""
    librosa = _librosa()
    found = librosa.feature.mfcc(
        y=audio, sr=sample_rate, n_mfcc=coefficients, n_fft=round(0.025 * sample_rate),
        hop_length=round(hop * sample_rate), n_mels=40,
    )  # fmt: skip
    return np.ascontiguousarray(found.T.astype(np.float32))


def lost_in_mix(power: Float[np.ndarray, " c"], mixed_power: float) -> int | None:
    """The loudest channel, where next to nothing of it is in the mix (`LOST_DB`): channels that cancel each other out.

    power, mixed_power: of the channels and of their mix, over the same samples. None: the mix is good.
    """
    if not len(power) or mixed_power >= 10 ** (-LOST_DB / 10) * power.max():
        return None
    return int(power.argmax())


def remarks(audio: Float32[np.ndarray, " n"], name: str) -> list[str]:
    """What a user should know of a voice before a video is made of it, one line each; mostly nothing."""
    level = loudness(audio)
    if level < SILENT_DB:
        heard = "digital silence" if level == -np.inf else f"{level:.0f} dB"
        return [f"{name}: nothing is said in it ({heard}): lips will move by chance or not at all"]
    said = []
    if level < QUIET_DB:
        said.append(f"{name}: very quiet ({level:.0f} dB, speech is at -30 to -15): its noise may be heard as speech")
    start, stop = trim_silence(audio)
    ends = {"start": start / SAMPLE_RATE, "end": (len(audio) - stop) / SAMPLE_RATE}
    silent = [f"{seconds:.1f} s at its {end}" for end, seconds in ends.items() if seconds > LONG_SILENCE]
    if silent:
        said.append(f"{name}: silent for {' and '.join(silent)}, which the video shows too")
    return said


def _levels(audio: Float32[np.ndarray, " n"], frame: int, hop: int, margin: int = 0) -> Float32[np.ndarray, " t"]:
    """Root mean squares of frames that begin every `hop` samples, with `margin` zeros at both ends; of a sound that is
    shorter than one frame, that one. A piece of the sound at a time is in memory."""
    rms = _librosa().feature.rms
    count = max(0, len(audio) + 2 * margin - frame) // hop + 1
    levels, together = np.empty(count, np.float32), max(1, pieces.PIECE // hop)
    for first in range(0, count, together):
        last = min(first + together, count)
        start, stop = first * hop - margin, (last - 1) * hop - margin + frame
        piece = np.pad(audio[max(0, start) : stop], (max(0, -start), max(0, stop - len(audio))))
        levels[first:last] = rms(y=piece, frame_length=frame, hop_length=hop, center=False)[0]
    return levels


def _librosa() -> Any:
    """librosa, which asks at its import for a home; and numba under it for a folder to keep programs in."""
    if not has_home():
        os.environ.setdefault("XDG_CACHE_HOME", tempfile.gettempdir())
        os.environ.setdefault("NUMBA_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"numba-{os.getuid()}"))
    import librosa

    return librosa
