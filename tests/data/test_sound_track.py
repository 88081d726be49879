"""Voices mixed where they are read: sums in closed form, and the same in any slices."""

import numpy as np
import pytest

from mi_jax.data import pieces
from mi_jax.data.sound_track import SoundTrack


def test_mixed_voices_never_clip_and_one_is_left_alone():
    loud = np.full(10, 0.8, np.float32)
    np.testing.assert_allclose(SoundTrack([loud, loud[:4]], 6)[:], [1, 1, 1, 1, 0.5, 0.5])
    np.testing.assert_array_equal(SoundTrack([loud * 2], 12)[:], [*loud * 2, 0, 0])


@pytest.mark.parametrize("channels", [(1,), (2,), (1, 1), (2, 1), (1, 2, 2)])
def test_slices_are_those_of_the_whole_sum(monkeypatch, channels):
    monkeypatch.setattr(pieces, "PIECE", 7)
    rng = np.random.default_rng(0)
    lengths = [90, 40, 120]
    voices = [rng.normal(size=(n, c)).astype(np.float32) for n, c in zip(lengths, channels)]
    total = np.zeros((100, max(channels)), np.float32)
    for voice in voices:
        total[: len(voice)] += voice[:100]
    if len(voices) > 1:
        total /= np.abs(total).max()
    total = total if max(channels) == 2 else total[:, 0]
    track = SoundTrack([voice[:, 0] if voice.shape[1] == 1 else voice for voice in voices], 100)
    assert (track.shape, track.ndim, len(track)) == (total.shape, total.ndim, 100)
    for ends in ((None, None), (0, 0), (10, 50), (85, 95), (95, 300), (70, 60), (-5, None)):
        part = slice(*ends)
        np.testing.assert_array_equal(track[part], total[part])
    assert pieces.peak(track) == np.abs(total).max()
    with pytest.raises(ValueError, match="steps of 2"):
        track[::2]


def test_a_peak_of_pieces_sees_what_is_no_number(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 3)
    samples = np.float32([0, -2, 1, 0, np.nan, 0, 1])
    assert pieces.peak(samples[:4]) == 2
    assert pieces.peak(samples[:0]) == 0
    assert np.isnan(pieces.peak(samples))
    assert pieces.all_finite(samples[:4])
    assert not pieces.all_finite(samples)
