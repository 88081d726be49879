"""The readers are calibrated on the truth: what they measure in true clips is what was directed and recorded there."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mi_jax.puppets import reading as read
from mi_jax.puppets.clips import SPLITS, draw


@pytest.fixture(scope="module")
def clips():
    return [draw(40 + i, split=SPLITS[i % 2], seconds=2.6) for i in range(10)]


def _degraded(video: np.ndarray, seed: int) -> np.ndarray:
    """Blurred, tinted and noisy, as a small decoder leaves it."""
    rng = np.random.default_rng(seed)
    soft = np.stack([np.asarray(Image.fromarray(f).filter(ImageFilter.GaussianBlur(0.8))) for f in video])
    noisy = soft * rng.uniform(0.95, 1.05, 3) + rng.uniform(-5, 5, 3) + rng.normal(0, 3, soft.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def test_expression_head_and_background_are_read_as_directed(clips):
    right = {"expression": 0, "head_motion": 0, "background_motion": 0}
    for clip in clips:
        for name, (told, seen) in read.obedience(clip.video, clip.attributes).items():
            right[name] += told == seen
    assert min(right.values()) >= len(clips) - 1, right


def test_readers_survive_blur_tint_and_noise(clips):
    right, scores = 0, []
    for seed, clip in enumerate(clips):
        video = _degraded(clip.video, seed)
        scores.append(read.correlation(read.mouth_opening(video, clip.attributes), clip.mouth[:, 0]))
        if seed < 4:
            right += sum(told == seen for told, seen in read.obedience(video, clip.attributes).values())
    assert np.median(scores) >= 0.98
    assert min(scores) >= 0.93
    assert right >= 11


def test_mouth_of_another_clip_does_not_correlate(clips):
    others = [
        abs(read.correlation(read.mouth_opening(a.video, a.attributes), b.mouth[:, 0]))
        for a, b in zip(clips, [*clips[1:], clips[0]])
    ]
    assert np.mean(others) < 0.3


def test_opening_is_measured_in_fractions_of_the_picture(clips):
    for clip in clips:
        error = read.mouth_opening(clip.video, clip.attributes) - clip.mouth[:, 0]
        assert np.abs(error).mean() * 96 < 0.7  # pixels


def test_a_clip_without_its_motion_reads_as_still(clips):
    """The detectors see the video, not the attributes: a frozen clip is still, a reversed one drifts back."""
    for clip in clips[:3]:
        frozen = np.broadcast_to(clip.video[:1], clip.video.shape)
        head = read.read_head(frozen, clip.attributes)
        assert (head.motion, head.expression) == ("still", "neutral")
        assert read.background_motion(frozen, clip.attributes) == "still"
    opposite = {"still": "still", "left": "right", "right": "left", "up": "down", "down": "up"}
    for clip in clips:
        assert (
            read.background_motion(clip.video[::-1], clip.attributes) == opposite[clip.attributes["background_motion"]]
        )


@pytest.mark.parametrize("late", [-3, 0, 2, 7])
def test_sync_offset_counts_the_frames_of_a_delay(late):
    track = np.convolve(np.random.default_rng(0).standard_normal(200), np.ones(5) / 5, mode="same")
    measured = 0.3 + 2 * np.roll(track, late)[20:180]
    assert read.sync_offset(measured, track[20:180]) == late


def test_correlation_in_closed_form():
    ramp = np.arange(10.0)
    assert read.correlation(ramp, 3 * ramp + 1) == pytest.approx(1)
    assert read.correlation(ramp, -ramp) == pytest.approx(-1)
    assert read.correlation(ramp, np.ones(10)) == 0


def test_sharpness_is_one_for_the_truth_and_falls_with_blur(clips):
    video = clips[0].video
    soft = np.stack([np.asarray(Image.fromarray(f).filter(ImageFilter.GaussianBlur(1))) for f in video])
    assert read.sharpness(video, video) == pytest.approx(1)
    assert read.sharpness(soft, video) < 0.5


def test_identity_is_nearest_for_the_own_portrait(clips):
    for clip, other in itertools.pairwise(clips[:5]):
        own = read.identity(clip.video, clip.video[0], clip.attributes)
        assert read.identity(np.broadcast_to(clip.video[:1], clip.video.shape), clip.video[0], clip.attributes) == 0
        assert own < 0.5 * read.identity(clip.video, other.video[0], clip.attributes)
