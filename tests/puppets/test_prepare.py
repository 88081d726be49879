"""Prepared records say of a clip what the sampler says of the same picture, voices and prompt."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_avatar import make_avatar, tiny_config

from mi_jax import cli
from mi_jax.data.features import latent_mask
from mi_jax.data.records import RecordSource
from mi_jax.errors import InputError
from mi_jax.puppets.clips import draw
from mi_jax.puppets.groups import draw_duet
from mi_jax.puppets.prepare import prepare_puppets
from mi_jax.train.curriculum import CurriculumObjective

SECONDS, SIZE = 0.68, 32


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    avatar = make_avatar()
    folder = tmp_path_factory.mktemp("prepared") / "records"
    prepare_puppets(avatar.encoders, folder, 1, duets=1, first=3, seed=5, seconds=SECONDS, size=SIZE)
    return avatar, folder


@pytest.mark.parametrize("speakers", [1, 2])
def test_training_and_sampling_are_told_the_same(prepared, speakers):
    avatar, folder = prepared
    record = RecordSource(str(folder))[speakers - 1]
    clip = (draw, draw_duet)[speakers - 1](3, seed=5, seconds=SECONDS, size=SIZE)
    voices, masks = (np.reshape(x, (speakers, *x.shape[-d:])) for x, d in ((clip.audio, 1), (clip.mask, 2)))
    t = len(record["latents"])
    told = avatar.conditions(clip.video[0], masks, list(voices), clip.prompt, t)

    objective = CurriculumObjective(
        dit=avatar.config.dit, records=str(folder), windows=((t, 1),), window_weights=(1.0,), mid_clip=0.0, speakers=2
    )
    batches = [objective.dataset(0)[i] for i in range(2)]
    trained = next(b for b in batches if np.array_equal(b["latents"][0], record["latents"]))
    trained = objective.conditions(avatar.dit, {name: jnp.asarray(x) for name, x in trained.items()})
    for name in ("text_tokens", "image_tokens", "portrait", "text_pooled"):
        np.testing.assert_allclose(getattr(trained, name), getattr(told, name), atol=4e-3, err_msg=name)  # f16 records
    np.testing.assert_array_equal(trained.text_mask, told.text_mask)
    np.testing.assert_array_equal(trained.face_mask[:, :speakers], told.face_mask)
    np.testing.assert_allclose(trained.audio[:, :speakers], told.audio, atol=2e-2)
    assert not np.asarray(trained.face_mask[:, speakers:]).any()


def test_moving_masks_follow_the_face_latent_frame_by_latent_frame(prepared, tmp_path):
    """Each is that of the video frames that its latents hold; their union over time is the mask of the whole clip."""
    avatar, folder = prepared
    options = {"seed": 5, "seconds": SECONDS, "size": SIZE}
    prepare_puppets(avatar.encoders, tmp_path / "moving", 1, duets=1, first=3, moving_masks=True, **options)
    moving, still = RecordSource(tmp_path / "moving"), RecordSource(folder)
    assert (moving.meta["puppets"]["moving_masks"], still.meta["puppets"]["moving_masks"]) == (True, False)
    for i, make in enumerate((draw, draw_duet)):
        faces = make(3, moving_masks=True, **options).mask
        faces = faces.reshape(i + 1, *faces.shape[-3:])
        assert (faces != faces[:, :1]).any()
        got, t = moving[i]["face_mask"], len(moving[i]["latents"])
        for k in range(t):
            frames = slice(4 * k - 3, 4 * k + 1) if k else slice(0, 1)
            expected = [latent_mask(face[frames].any(0), 8) for face in faces]
            np.testing.assert_array_equal(got[:, k], np.stack(expected))
        assert got.shape[1] == t == (faces.shape[1] - 1) // 4 + 1
        np.testing.assert_array_equal(got.max(1), still[i]["face_mask"])
        for name in ("latents", "audio_hidden"):
            np.testing.assert_array_equal(moving[i][name], still[i][name])


@pytest.mark.parametrize("lacking", ["wav2vec2", "vision tower"])
def test_encoders_without_ears_or_eyes_make_no_records(tmp_path, lacking):
    encoders = make_avatar().encoders
    if lacking == "wav2vec2":
        encoders = dataclasses.replace(encoders, wav2vec2=None)
    else:
        encoders.mllm.vision = None
    with pytest.raises(InputError, match=f"no {lacking}"):
        prepare_puppets(encoders, tmp_path / "records", 1)
    assert not list(tmp_path.iterdir())


def test_records_hold_the_latents_of_the_video(prepared):
    avatar, folder = prepared
    source = RecordSource(str(folder))
    assert len(source) == 2
    assert source.meta["puppets"]["duets"] == 1
    video = avatar.decode(source[0]["latents"].astype(np.float32))
    assert video.shape == draw(3, seed=5, seconds=SECONDS, size=SIZE).video.shape
    np.testing.assert_allclose(source[1]["latents"][0], source[1]["portrait"], atol=2e-2)  # the first frame alone


def test_sizes_that_do_not_divide_are_padded(tmp_path):
    """The model's videos have 30 pixels; its networks, and so its records, 32."""
    config = tiny_config(height=30, width=30)
    make_avatar(config).save(tmp_path / "model")
    argv = ["prepare", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "records"), "--puppets", "1"]
    assert cli.main([*argv, "--seconds", "0.2", "--workers", "1", "--moving-masks"]) == 0
    source = RecordSource(str(tmp_path / "records"))
    assert source.meta["puppets"]["size"] == 32
    record = source[0]
    assert record["latents"].shape[1:3] == record["portrait"].shape[:2] == record["face_mask"].shape[2:] == (4, 4)
    assert record["face_mask"].shape[:2] == (1, len(record["latents"]))
    assert config.padded_size == (32, 32)


def test_sizes_that_the_vae_does_not_take_are_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("mi_jax.puppets.prepare.drawn", lambda *_, **__: pytest.fail("the long work began"))
    with pytest.raises(InputError, match="clips of 30 pixels: the VAE takes multiples of 8"):
        prepare_puppets(make_avatar().encoders, tmp_path / "records", 1, size=30)
    assert not list(tmp_path.iterdir())
