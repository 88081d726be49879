"""The weights that ship: they fit the package, and what they make is the puppet of the portrait, speaking: the student
in its four steps, and its teacher in as many of its 25."""

import dataclasses

import numpy as np
import pytest

import mi_jax
from mi_jax.avatar.folders import avatar_config, find_model
from mi_jax.puppets.clips import draw
from mi_jax.puppets.reading import correlation, identity, mouth_opening
from mi_jax.sample.avatar import guidance_branches


@pytest.fixture(scope="module", params=["puppet", "puppet-teacher"])
def clip_and_video(request):
    """A puppet that training never saw, in 33 frames: one window."""
    clip = draw(5, seed=1000, split="test", seconds=1.32)
    speaker = mi_jax.Speaker(clip.audio, mask=clip.mask)
    video = mi_jax.load(request.param, devices=1).animate(clip.video[0], [speaker], clip.prompt, seed=0, steps=4)
    return clip, video


def test_the_models_have_at_most_55_mb():
    files = [path for name in ("puppet", "puppet-teacher") for path in find_model(name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 55e6


def test_the_student_is_sampled_in_four_steps_without_guidance():
    student, teacher = avatar_config("puppet"), avatar_config("puppet-teacher")
    assert (student.steps, student.guidance_audio, student.guidance_text) == (4, 0.0, 0.0)
    assert student == dataclasses.replace(teacher, steps=4, guidance_audio=0.0)
    assert guidance_branches(student.dit, {"audio": student.guidance_audio, "text": student.guidance_text}) == 1


def test_a_video_is_as_long_as_its_voice_and_shows_the_puppet_of_its_portrait(clip_and_video):
    clip, video = clip_and_video
    assert video.shape == (33, 96, 96, 3)
    others = [draw(i, seed=1000, split="test", seconds=0.2, window=(0, 1)).video[0] for i in range(10, 18)]
    own = identity(video, clip.video[0], clip.attributes)
    assert own < 0.12
    assert own < 0.6 * min(identity(video, other, clip.attributes) for other in others)


def test_the_first_frame_is_the_portrait(clip_and_video):
    """Window 0 starts with the portrait's own latents: nearer to it, pixel by pixel, than the last frame is."""
    clip, video = clip_and_video
    first, last = (np.abs(video[k].astype(float) - clip.video[0]).mean() for k in (0, -1))
    assert first < 16
    assert first < last


def test_its_lips_say_what_is_heard(clip_and_video):
    """The mouth's opening, read from the pixels, goes with the true one."""
    clip, video = clip_and_video
    assert correlation(mouth_opening(video, clip.attributes), clip.mouth[:, 0]) > 0.7
