"""Silence, loudness and cepstrum of voices whose values are known, and what is remarked."""

import os
import subprocess
import sys

import librosa
import numpy as np
import pytest
from tiny_avatar import voice

from mi_jax.data import pieces, sound

RATE = 16000


def sine(seconds: float, amplitude: float = 1.0, frequency: float = 440.0) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * frequency * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


@pytest.mark.parametrize(("amplitude", "decibels"), [(1.0, -3.01), (0.5, -9.03), (0.001, -63.01)])
def test_a_sine_is_three_decibels_below_its_amplitude(amplitude, decibels):
    assert sound.loudness(sine(2.0, amplitude)) == pytest.approx(decibels, abs=0.01)
    assert sound.loudness(sine(0.2, amplitude)) == pytest.approx(decibels - 3.01, abs=0.01)  # half a block of 400 ms


def test_pauses_do_not_make_a_voice_quieter():
    """Blocks that lie across an edge count in part: a little less, where plain power would lose 9.5 dB."""
    tone = sine(3.0, 0.1)
    padded = np.concatenate([np.zeros(12 * RATE, np.float32), tone, np.zeros(12 * RATE, np.float32)])
    assert sound.loudness(padded) == pytest.approx(sound.loudness(tone), abs=0.5)


def test_what_is_far_below_the_rest_does_not_count():
    tone = sine(6.0, 0.1)
    with_noise = np.concatenate([tone, sine(12.0, 0.005), tone])  # noise of a room, 26 dB below
    assert sound.loudness(with_noise) == pytest.approx(sound.loudness(tone), abs=0.5)


def test_digital_silence_has_no_loudness():
    assert sound.loudness(np.zeros(RATE, np.float32)) == -np.inf


@pytest.mark.parametrize("noise", [0.0, 1e-4])
def test_silence_at_both_ends_is_found(noise):
    padded = np.pad(sine(1.0, 0.1), (2 * RATE, RATE // 2))
    padded += (noise * np.random.default_rng(0).normal(size=len(padded))).astype(np.float32)
    start, stop = sound.trim_silence(padded)
    assert start == pytest.approx(2 * RATE, abs=800)
    assert stop == pytest.approx(3 * RATE, abs=800)
    assert sound.trim_silence(padded[start:stop]) == (0, stop - start)


def test_where_nothing_is_said_there_is_no_start():
    assert sound.trim_silence(np.zeros(RATE, np.float32)) == (0, 0)
    assert sound.trim_silence(sine(1.0, 1e-4)) == (0, 0)


@pytest.mark.parametrize("piece", [1, 5000, pieces.PIECE])
@pytest.mark.parametrize("length", [1, 100, 511, 512, 513, 1600, 6399, 6400, 6401, 8000, 20_000, 50_001])
def test_pieces_give_the_levels_of_the_whole(monkeypatch, piece, length):
    """librosa's of the whole sound at once, and what it trims."""
    monkeypatch.setattr(pieces, "PIECE", piece)
    rng = np.random.default_rng(length)
    audio = (0.1 * rng.normal(size=length) * (np.arange(length) % 20_000 > 9000)).astype(np.float32)
    blocks = np.pad(audio, (0, max(0, 6400 - length)))
    power = librosa.feature.rms(y=blocks, frame_length=6400, hop_length=1600, center=False)[0].astype(np.float64) ** 2
    np.testing.assert_allclose(sound._levels(audio, 6400, 1600).astype(np.float64) ** 2, power, rtol=1e-6)
    power = power[power > 1e-7]
    power = power[power > 0.1 * power.mean()] if len(power) else power
    expected = 10 * np.log10(power.mean()) if len(power) else -np.inf
    assert sound.loudness(audio) == pytest.approx(expected, abs=1e-5)
    reference = max(librosa.feature.rms(y=audio, frame_length=1024, hop_length=256).max(), 0.1)
    _, kept = librosa.effects.trim(audio, top_db=40, ref=reference, frame_length=1024, hop_length=256)
    assert sound.trim_silence(audio) == tuple(kept)


def test_cepstrum():
    """Twice as loud is 6.02 dB more in each of 40 bands: sqrt(40) times that in the first coefficient alone."""
    noise = (0.1 * np.random.default_rng(0).normal(size=RATE)).astype(np.float32)
    found, louder = sound.mfcc(noise), sound.mfcc(2 * noise)
    assert found.shape == (101, 13)
    assert sound.mfcc(noise, coefficients=20, hop=0.04).shape == (26, 20)
    np.testing.assert_allclose(louder[:, 0] - found[:, 0], 20 * np.log10(2) * np.sqrt(40), atol=1e-2)
    np.testing.assert_allclose(louder[:, 1:], found[:, 1:], atol=1e-2)
    later = sound.mfcc(np.pad(noise, (1600, 0)))  # ten rows later, the same
    np.testing.assert_allclose(later[15:100], found[5:90], atol=1e-3)


def test_remarks():
    speech = voice(2.0)  # about -23 dB
    assert sound.remarks(speech, "voice 1") == []
    assert sound.remarks(np.zeros(RATE, np.float32), "voice 2") == [
        "voice 2: nothing is said in it (digital silence): lips will move by chance or not at all"
    ]
    assert "nothing is said in it (-63 dB)" in sound.remarks(0.01 * speech, "v")[0]
    (quiet,) = sound.remarks(0.04 * speech, "v")
    assert quiet == "v: very quiet (-51 dB, speech is at -30 to -15): its noise may be heard as speech"
    padded = np.pad(speech, (int(2.5 * RATE), int(1.25 * RATE)))
    (silent,) = sound.remarks(padded, "v")
    assert silent == "v: silent for 2.5 s at its start and 1.2 s at its end, which the video shows too"


def test_a_user_without_a_home_hears_too():
    """librosa asks for a home at its import, and numba for a folder."""
    code = (
        "import os; os.path.expanduser = lambda path: path\n"
        "import numpy as np; from mi_jax.data.sound import loudness\n"
        "print(loudness(np.full(16000, 0.1, np.float32)))"
    )
    without = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    done = subprocess.run([sys.executable, "-c", code], env=without, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(-20, abs=1)
