"""From files to frames, on an untrained avatar: lengths, seeds, masks, what is heard, and what is refused."""

import dataclasses
import gc
import io
import json
import logging
import threading
import time
from operator import attrgetter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tiny_avatar import make_avatar, portrait, tiny_config, voice
from tiny_media import write_wav

import mi_jax
from mi_jax.avatar.folders import find_model
from mi_jax.data import faces, pictures, sound_files
from mi_jax.data.utterances import Utterances
from mi_jax.data.video_files import write_video
from mi_jax.errors import InputError
from mi_jax.mesh import make_mesh
from mi_jax.models import hidden_states as heard_module
from mi_jax.models import tiling
from mi_jax.models.audio_encoder import cut_audio
from mi_jax.models.hidden_states import HiddenStates, hidden_states
from mi_jax.sample import avatar as avatar_module
from mi_jax.sample import stream as stream_module
from mi_jax.sample.avatar import Avatar, load
from mi_jax.sample.inputs import Speaker, find_masks, latent_masks, num_frames, read_voice
from mi_jax.sample.save import save_video

SECONDS = 0.5  # every test animates the same 12 frames in 4 latent frames, compiled once


@pytest.fixture(scope="module", autouse=True)
def no_detector():
    """Whether a face detector is at hand must not decide a test."""

    def unavailable(*_):
        raise faces.DetectorUnavailable("no detector here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faces, "detect_faces", unavailable)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("avatar") / "model"
    make_avatar().save(folder, dtype=np.float32)
    return folder


@pytest.fixture(scope="module")
def avatar(folder) -> Avatar:
    return load(folder, devices=1)


def animate(avatar: Avatar, **changes) -> np.ndarray:
    call = {
        "portrait": portrait(),
        "speakers": [Speaker(voice(SECONDS))],
        "prompt": "She is happy.",
        "guidance_audio": 1.0,
    }
    return avatar.animate(**(call | changes))


def test_frames_seed_and_every_input_decide_the_video(avatar):
    video = animate(avatar)
    assert video.shape == (12, 32, 32, 3)  # 12.5 rounds to even
    assert video.dtype == np.uint8
    np.testing.assert_array_equal(animate(avatar), video)
    changes = [
        {"seed": 1},
        {"portrait": portrait(seed=1)},
        {"speakers": [Speaker(voice(SECONDS, seed=1))]},
        {"prompt": "He is sad."},
        {"steps": 3},
        {"guidance_audio": 2.0},
    ]
    for change in changes:
        assert (animate(avatar, **change) != video).mean() > 0.01, change


def test_a_new_length_compiles_nothing_anew(avatar):
    """Of videos that are more than one window."""
    programs = [heard_module._encode, avatar_module._encode_audio, stream_module.advance, tiling._decode]
    made = lambda seconds: animate(avatar, speakers=[Speaker(voice(seconds))], window=4, overlap=3)  # noqa: E731
    made(1.0)
    before = [program._cache_size() for program in programs]
    for seconds in (0.66, 0.8, 1.1):
        assert len(made(seconds)) == round(25 * seconds)
    assert [program._cache_size() for program in programs] == before


def test_frames_come_as_they_are_made_and_are_the_same_video(avatar):
    seen = []
    told = {"speakers": [Speaker(voice(2.0))], "window": 4, "overlap": 3, "portrait": portrait(), "prompt": "She nods."}
    whole = avatar.animate(**told)
    pieces = avatar.stream(**told, progress=lambda done, total: seen.append((done, total)))
    first = next(pieces)
    passes = seen[-1]
    assert passes[0] < passes[1] == 2 * 11  # windows of 4 that share 3 cover 14 latent frames
    np.testing.assert_array_equal(np.concatenate([first, *pieces]), whole)
    by_level = avatar.animate(**told, order="level")
    assert np.abs(by_level.astype(int) - whole).max() <= 1
    causal = avatar.animate(**told, order="causal")
    assert causal.shape == whole.shape
    assert (causal != whole).mean() > 0.1


@pytest.mark.parametrize("order", ["wavefront", "causal"])
def test_frames_are_gone_on_with_where_they_were_left(avatar, order):
    told = {"speakers": [Speaker(voice(2.0))], "window": 4, "overlap": 3, "order": order}
    make = lambda: avatar.stream(portrait(), prompt="She nods.", **told)  # noqa: E731
    whole = list(make())
    for left in (0, 1, 3, len(whole)):
        before, after = make(), make()
        pieces = [next(before) for _ in range(left)]
        after.restore(before.state())
        np.testing.assert_array_equal(np.concatenate([*pieces, *after]), np.concatenate(whole))


def spoken(samples: np.ndarray, piece: int):
    return (samples[first : first + piece] for first in range(0, len(samples), piece))


@pytest.mark.parametrize(("seconds", "frames"), [(2.0, 50), (0.1, 2), (0.53, 13)])
def test_of_a_voice_that_arrives_it_is_one_video_however_it_comes_in(avatar, seconds, frames):
    options = {"portrait": portrait(), "prompt": "", "window": 4, "overlap": 3, "steps": 1}
    made = [
        np.concatenate(list(avatar.stream(speakers=[Speaker(spoken(voice(seconds), piece))], **options)))
        for piece in (320, 7_000, 10**6)
    ]
    assert made[0].shape == (frames, 32, 32, 3)
    for video in made[1:]:
        np.testing.assert_array_equal(video, made[0])
    whole = avatar.animate(speakers=[Speaker(voice(seconds))], **options)
    assert np.abs(made[0].astype(int) - whole).mean() < 10  # it is told by less sound


def test_two_voices_of_which_one_arrives(avatar):
    masks = np.zeros((2, 40, 48), bool)
    masks[0, :, :20], masks[1, :, 28:] = True, True
    speakers = [Speaker(spoken(voice(1.0), 800), masks[0]), Speaker(voice(0.4), masks[1])]
    options = {"portrait": portrait(), "window": 4, "overlap": 3, "steps": 1}
    assert sum(map(len, avatar.stream(speakers=speakers, **options))) == 25
    cut = [Speaker(spoken(voice(5.0), 800), masks[0]), Speaker(spoken(voice(9.0), 800), masks[1])]
    assert sum(map(len, avatar.stream(speakers=cut, seconds=1.2, **options))) == 30


def test_frames_come_while_it_is_still_spoken(avatar):
    taken = []

    def speaking():
        for piece in spoken(voice(8.0), 1600):
            while len(taken) >= allowed[0]:
                time.sleep(0.001)
            taken.append(1)
            yield piece

    # Tenths of a second, to half a second behind the 6 latent frames that the VAE wants first, or the 15 of the windows
    # that come after those by wavefront.
    for order, needed in (("causal", 15), ("wavefront", 29)):
        taken.clear()
        allowed = [needed]
        told = {"window": 4, "overlap": 3, "steps": 2, "order": order}
        pieces = avatar.stream(portrait(), [Speaker(speaking())], **told)
        assert len(next(pieces)) >= 1
        assert len(taken) <= needed
        allowed[0] = 10**6
        assert sum(map(len, pieces)) in range(180, 200)


def test_a_source_without_end_waits_and_is_let_go(avatar):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield np.zeros(0, np.float32)
            yield voice(0.5)

    told = {"window": 4, "overlap": 3, "steps": 1}
    pieces = avatar.stream(portrait(), [Speaker(endless())], **told)
    assert len(next(pieces)) >= 1
    assert len(taken) < 64 + 60 + 20  # the queue's, what is read ahead, what was needed
    taken.clear()
    assert sum(map(len, avatar.stream(portrait(), [Speaker(endless())], seconds=1.0, **told))) == 25
    time.sleep(0.5)
    before = len(taken)
    time.sleep(0.5)
    assert len(taken) == before


def test_a_microphone_may_fill_the_same_memory_again(avatar):
    buffer, samples = np.zeros(1600, np.float32), voice(1.6)

    def microphone():
        for first in range(0, len(samples), len(buffer)):
            buffer[:] = samples[first : first + len(buffer)]
            yield buffer

    told = {"window": 4, "overlap": 3, "steps": 1}
    heard, given = (
        np.concatenate(list(avatar.stream(portrait(), [Speaker(source)], **told)))
        for source in (microphone(), spoken(samples, 1600))
    )
    np.testing.assert_array_equal(heard, given)


def test_a_source_is_let_go_where_nobody_wants_its_video_any_more(avatar):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield voice(0.05)

    frames = avatar.stream(portrait(), [Speaker(endless())], window=4, overlap=3, steps=1)
    next(frames)
    del frames
    gc.collect()
    time.sleep(0.5)
    before = len(taken)
    time.sleep(0.5)
    assert len(taken) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("voice")]


def test_sounds_with_their_times_beside_one_that_arrives(avatar):
    masks = np.zeros((2, 40, 48), bool)
    masks[0, :, :20], masks[1, :, 28:] = True, True
    speakers = [Speaker(spoken(voice(1.0), 800), masks[0]), Speaker([(0.1, voice(0.3)), (0.6, voice(0.2))], masks[1])]
    assert sum(map(len, avatar.stream(portrait(), speakers, window=4, overlap=3, steps=1))) == 25
    with pytest.raises(InputError, match="window is 150: of voices that are still arriving at most 112"):
        avatar.stream(portrait(), [Speaker(spoken(voice(1.0), 800))], window=150)


def test_voices_that_stall_end_or_fail(avatar):
    told = {"portrait": portrait(), "window": 4, "overlap": 3, "steps": 1}
    stalled = avatar.live_listening(
        portrait(), [np.ones((40, 48), bool)], [(time.sleep(20) for _ in range(3))], "", stall=0.05
    )
    with pytest.raises(InputError, match=r"^voice 1: no sound has come for 0\.05 s$"):
        next(avatar.denoise_stream(stalled, seed=0, steps=1, window=4, overlap=3, weights={}))
    with pytest.raises(InputError, match=r"^voice 1: ended without a single sample$"):
        next(avatar.stream(speakers=[Speaker(iter([]))], **told))
    with pytest.raises(InputError, match=r"^voice 1: .*NaN"):
        next(avatar.stream(speakers=[Speaker(iter([np.full(800, np.nan, np.float32)]))], **told))

    def failing():
        yield voice(0.2)
        raise ConnectionResetError("the line is dead")

    with pytest.raises(ConnectionResetError, match="the line is dead"):
        list(avatar.stream(speakers=[Speaker(failing())], **told))
    with pytest.raises(InputError, match='order "level" needs the length'):
        avatar.stream(speakers=[Speaker(failing())], order="level", **told)


def test_a_prompt_that_changes_holds_from_its_time_on(avatar):
    told = {"portrait": portrait(), "speakers": [Speaker(voice(2.0))], "window": 4, "overlap": 3, "steps": 1}
    happy, sad = (avatar.animate(prompt=prompt, **told) for prompt in ("She is happy.", "He is sad."))
    both = avatar.animate(prompt=[(0, "She is happy."), (1.0, "He is sad.")], **told)
    np.testing.assert_array_equal(both[:17], happy[:17])  # no window whose middle is in the second half sees these
    assert np.abs(both[36:].astype(int) - sad[36:]).max() <= 1  # the VAE looks back further
    assert (both[20:] != happy[20:]).mean() > 0.01
    with pytest.raises(InputError, match=r"prompt: from 1 s on, after one from 2 s on: times run backwards"):
        avatar.animate(prompt=[(0, "a"), (2, "b"), (1, "c")], **told)


def test_a_speaker_of_several_sounds_is_silent_between(avatar):
    told = {"portrait": portrait(), "window": 4, "overlap": 3, "steps": 1}
    one, two = voice(0.6), voice(0.5, seed=3)
    made = avatar.animate(speakers=[Speaker([(0.2, one), (1.3, two)])], **told)
    assert len(made) == 45
    joined = np.concatenate([np.zeros(3200, np.float32), one, np.zeros(8000, np.float32), two])
    said = Utterances("voice", (3200, 20_800), (one, two))
    heard = avatar.listening(portrait(), [np.ones((40, 48), bool)], [said], "", 12).voices[0].samples
    both = np.concatenate([one, two])
    said_there = np.r_[3200:12_800, 20_800:28_800]
    expected = np.zeros(len(joined))
    expected[said_there] = (joined[said_there] - both.mean()) / both.std()
    np.testing.assert_allclose(heard[: len(joined)], expected, atol=1e-3)
    with pytest.raises(InputError, match=r"voice 1: sound 2 begins at 0\.50 s, before sound 1 has ended, at 0\.60 s"):
        avatar.animate(speakers=[Speaker([(0.0, one), (0.5, two)])], **told)


def test_a_box_is_a_mask(avatar):
    mask = np.zeros((40, 48), bool)
    mask[4:30, 10:40] = True
    np.testing.assert_array_equal(
        animate(avatar, speakers=[Speaker(voice(SECONDS), [10, 4, 40, 30])]),
        animate(avatar, speakers=[Speaker(voice(SECONDS), mask)]),
    )
    with pytest.raises(InputError, match=r"mask 1: the box \[10, 30, 40, 4\] .* marks no pixel of a portrait of 48x40"):
        animate(avatar, speakers=[Speaker(voice(SECONDS), [10, 30, 40, 4])])


def test_a_mask_that_moves_is_told_to_each_frame(avatar, tmp_path):
    """12 frames: a square that stands left in the first five (latents 0 and 1), then right."""
    moving = np.zeros((12, 40, 48), bool)
    moving[:5, 4:36, 4:20] = True
    moving[5:, 4:36, 28:44] = True
    masks = find_masks(avatar.config, portrait(), [moving, np.ones((40, 48), bool)], frames=12)
    on_grid = latent_masks(masks, avatar.config)
    assert on_grid.shape == (2, 4, 4, 4)
    np.testing.assert_array_equal(on_grid[0, :, 2] > 0, [[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2)
    assert on_grid[1].all()
    told = avatar.listening(portrait(), masks, [voice(0.48), voice(0.2)], "", 4)
    window = told.window(2, 4)  # beyond the end it stays where it was
    np.testing.assert_array_equal(window.face_mask[0, 0, :, 2] > 0, [[0, 0, 1, 1]] * 4)
    write_video(tmp_path / "mask.mp4", np.repeat(moving[..., None], 3, -1).astype(np.uint8) * 255)
    from_file = find_masks(avatar.config, portrait(), [tmp_path / "mask.mp4"], frames=12)
    np.testing.assert_array_equal(from_file[0].latents, on_grid[0])
    video = animate(avatar, speakers=[Speaker(voice(SECONDS), moving)])
    assert (video != animate(avatar, speakers=[Speaker(voice(SECONDS), moving.any(0))])).any()
    for mask, fault in (
        (moving[:7], r"mask 1: a mask of 0\.28 s for a video of 0\.48 s"),
        (moving * 0, "mask 1: mask is empty where the video is"),
        (moving * 7, "mask 1: a mask that moves holds 0 and 1"),
        (tmp_path / "none.mp4", r"none\.mp4: video not found"),
    ):
        with pytest.raises(InputError, match=fault):
            animate(avatar, speakers=[Speaker(voice(SECONDS), mask)])
    with pytest.raises(InputError, match="a mask that moves: of voices that are still arriving"):
        avatar.stream(portrait(), [Speaker(iter([voice(1.0)]), moving)])


def test_a_video_is_the_beginning_of_a_longer_one(avatar):
    """Until sound that the shorter one lacks is in a window's reach."""
    told = {"portrait": portrait(), "prompt": "", "window": 4, "overlap": 3, "steps": 1}
    sound = voice(4.0)
    longer = avatar.animate(speakers=[Speaker(sound)], **told)
    states = HiddenStates(avatar.encoders.wav2vec2, sound, 101)
    shorter = avatar.listening(portrait(), [np.ones((40, 48), bool)], [sound], "", 26)
    np.testing.assert_array_equal(shorter.voices[0].read(0, 60), states.read(0, 60))
    made = list(
        avatar.denoise_stream(
            dataclasses.replace(shorter, latent_frames=12), seed=0, steps=1, window=4, overlap=3,
            weights={"audio": 0.0}, noise=None,
        )
    )  # fmt: skip
    np.testing.assert_array_equal(avatar.decode(np.concatenate(made))[:25], longer[:25])


def test_every_kind_of_input_means_the_same(avatar, tmp_path):
    video = animate(avatar)
    pictures.write_image(tmp_path / "portrait.png", portrait())
    encoded = (voice(SECONDS) * 32767).round() / 32767
    sound_files.write_audio(tmp_path / "speech.wav", encoded.astype(np.float32))
    mask = np.ones(portrait().shape[:2], bool)
    pictures.write_image(tmp_path / "mask.png", mask.astype(np.uint8) * 255)
    files = Speaker(tmp_path / "speech.wav", tmp_path / "mask.png")
    from_files = animate(avatar, portrait=tmp_path / "portrait.png", speakers=[files])
    assert np.abs(from_files.astype(int) - video).max() <= 3  # 16-bit sound
    np.testing.assert_array_equal(animate(avatar, portrait=Image.fromarray(portrait())), video)
    np.testing.assert_array_equal(animate(avatar, speakers=[Speaker(voice(SECONDS), mask)]), video)


def test_progress_counts_the_steps(avatar):
    seen = []
    animate(avatar, steps=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(("seconds", "frames"), [(0.001, 1), (0.5, 12), (1.0, 25), (1.19, 30), (61.24, 1531)])
def test_frames_are_25_a_second(seconds, frames):
    assert num_frames(seconds) == frames


def test_longest_voice_decides_and_seconds_override(avatar):
    both = [Speaker(voice(0.2), np.eye(40, 48, dtype=bool)), Speaker(voice(SECONDS), np.ones((40, 48), bool))]
    assert len(animate(avatar, speakers=both)) == 12
    cut = animate(avatar, speakers=[Speaker(voice(2.0))], seconds=SECONDS)
    np.testing.assert_array_equal(cut, animate(avatar, speakers=[Speaker(voice(2.0)[:8000])]))


def test_conditions_of_two_speakers(avatar):
    masks = np.zeros((2, 40, 48), bool)
    masks[0, 19:21, 4:6], masks[1, :, 28:] = True, True  # of the crop [4:44] that is scaled to 32x32
    voices = [voice(0.2, seed=3), voice(SECONDS)]
    told = avatar.conditions(portrait(), masks, voices, "She nods.", latent_frames=4)
    assert told.audio.shape[:3] == (1, 2, 4)
    assert told.face_mask.shape == (1, 2, 4, 4)
    expected = np.zeros((4, 4))
    expected[1:3, 0] = 1  # two pixels across the border of two latent rows mark both
    np.testing.assert_array_equal(told.face_mask[0, 0], expected)
    np.testing.assert_array_equal(told.face_mask[0, 1], np.broadcast_to([0, 0, 1, 1], (4, 4)))
    for i, samples in enumerate(voices):
        steps = cut_audio(hidden_states(avatar.encoders.wav2vec2, samples, 13), 0, 4)
        alone = avatar.dit.encode_audio(jnp.asarray(steps)[None, None], jnp.ones(1))
        np.testing.assert_allclose(told.audio[:, i], alone[:, 0], atol=1e-5)
    assert float(told.is_start[0]) == 1
    assert bool(told.image_mask.all())


def test_a_speaker_moves_only_what_its_mask_marks(avatar):
    """With a mask that marks nothing on the latent grid the voice is without effect."""
    masks = np.ones((1, 40, 48), bool)
    told = avatar.conditions(portrait(), masks, [voice(SECONDS)], "", latent_frames=4)
    deaf = dataclasses.replace(told, face_mask=told.face_mask * 0)
    other = avatar.conditions(portrait(), masks, [voice(SECONDS, seed=5)], "", latent_frames=4)
    other = dataclasses.replace(other, face_mask=other.face_mask * 0)
    options = {"seed": 0, "steps": 2, "window": 33, "overlap": 8, "weights": {"audio": 1.0}}
    np.testing.assert_array_equal(avatar.denoise(deaf, **options), avatar.denoise(other, **options))
    assert np.abs(avatar.denoise(told, **options) - avatar.denoise(deaf, **options)).max() > 1e-3


def test_audio_in_chunks_is_audio_at_once(avatar, monkeypatch):
    hidden = hidden_states(avatar.encoders.wav2vec2, voice(1.96), 49)[None]
    whole = avatar.audio_tokens(hidden)
    assert whole.shape[:2] == (1, 13)
    for chunk in (1, 4, 5):
        monkeypatch.setattr(avatar_module, "AUDIO_CHUNK", chunk)
        np.testing.assert_allclose(avatar.audio_tokens(hidden), whole, atol=1e-5)


def test_sizes_that_do_not_divide_are_padded_and_cropped():
    config = tiny_config(height=30, width=40)
    assert config.padded_size == (32, 48)
    avatar = dataclasses.replace(make_avatar(), config=config)
    latents = np.random.default_rng(0).normal(size=(2, 4, 6, 4)).astype(np.float32)
    video = avatar.decode(latents)
    assert video.shape == (5, 30, 40, 3)
    whole = dataclasses.replace(avatar, config=tiny_config(height=32, width=48)).decode(latents)
    np.testing.assert_array_equal(video, whole[:, 1:31, 4:44])


def test_saved_and_loaded_it_is_the_same_avatar(avatar):
    made = make_avatar()
    assert avatar.config == made.config
    for part in ("dit", "encoders.vae", "encoders.wav2vec2", "encoders.mllm"):
        chex.assert_trees_all_equal(*(nnx.to_pure_dict(nnx.state(attrgetter(part)(one))) for one in (avatar, made)))
    told = (one.encoders.prompter.tokenize(["She is sad"], image=True).arrays for one in (avatar, made))
    chex.assert_trees_all_equal(*told)


@pytest.fixture
def traced(monkeypatch) -> list[tuple[int, int, int]]:
    """Of every step that is traced: data and seq of its mesh, and how many windows pass through the denoiser."""
    seen = []
    original = avatar_module.guided_velocity

    def counted(dit, weights, latents, sigma, conditions):
        mesh = jax.sharding.get_abstract_mesh()
        seen.append((mesh.shape["data"], mesh.shape["seq"], latents.shape[0]))
        return original(dit, weights, latents, sigma, conditions)

    jax.clear_caches()
    monkeypatch.setattr(avatar_module, "guided_velocity", counted)
    yield seen
    jax.clear_caches()


def assert_same_video(video: np.ndarray, expected: np.ndarray) -> None:
    difference = np.abs(video.astype(int) - expected)
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.05


def test_a_mesh_of_eight_devices_makes_the_same_video(avatar, folder):
    spread = load(folder, mesh=make_mesh(data=4, seq=2))
    kernels = [x for x in jax.tree.leaves(spread.dit) if x.size > 1000]
    assert all(not x.sharding.is_fully_replicated for x in kernels)
    assert_same_video(animate(spread), animate(avatar))


def test_by_default_all_devices_work_on_a_video_and_none_in_vain(avatar, folder, caplog, request):
    """Two branches of one window: four devices for each. Two branches of two windows: two for each."""
    longer = {"speakers": [Speaker(voice(0.6))], "window": 4, "overlap": 3}
    expected = animate(avatar), animate(avatar, **longer)
    caplog.set_level(logging.INFO, logger="mi_jax")
    traced = request.getfixturevalue("traced")
    spread = load(folder)
    assert spread.mesh.size == 8
    assert_same_video(animate(spread), expected[0])
    assert "8 devices: 1 window x 2 guidance branches over 2, the tokens of each over 4" in caplog.text
    assert_same_video(animate(spread, **longer), expected[1])
    assert traced == [(2, 4, 1), (4, 2, 2)]


def test_weights_that_lie_right_already_are_not_copied(folder):
    spread = load(folder, devices=4)
    laid_out = spread.on(make_mesh(2, 2, spread.mesh.devices.ravel().tolist()))
    assert laid_out.mesh.shape == {"data": 2, "seq": 2}
    for before, after in zip(jax.tree.leaves(spread.dit), jax.tree.leaves(laid_out.dit)):
        places = lambda x: [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards]  # noqa: E731
        assert places(before) == places(after)


def test_devices_that_are_chosen(folder):
    assert load(folder, devices=1).mesh is None
    chosen = load(folder, devices=4, seq=2)
    assert (chosen.mesh.shape, chosen.fits_mesh) == ({"data": 2, "seq": 2}, False)
    for choice, message in (
        ({"devices": 9}, r"devices is 9, but there are 8 \(cpu\)"),
        ({"devices": 0}, "devices is 0"),
        ({"devices": 4, "seq": 3}, "seq is 3, which does not divide the number of devices, 4"),
        ({"devices": 4, "mesh": make_mesh()}, "not both"),
    ):
        with pytest.raises(InputError, match=message):
            load(folder, **choice)


def test_it_says_which_mask_and_what_was_cut(avatar, caplog, tmp_path):
    caplog.set_level(logging.INFO, logger="mi_jax")
    animate(avatar, prompt="She is happy . " * 2500)  # 10,000 words
    assert "face mask: the whole picture (no detector here)" in caplog.text
    assert "its last 99" in caplog.text
    assert {record.levelno for record in caplog.records if "face mask" in record.message} == {logging.WARNING}
    caplog.clear()
    pictures.write_image(tmp_path / "m.png", np.full((20, 24), 255, np.uint8))
    animate(avatar, prompt="", speakers=[Speaker(voice(SECONDS), tmp_path / "m.png")])
    assert "resized from 24x20 to 48x40" in caplog.text
    assert {record.levelno for record in caplog.records} == {logging.INFO}
    assert "prompt" not in caplog.text


def torn_picture() -> Image.Image:
    """A PNG file that ends early: PIL opens it, and fails when its pixels are asked for."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(file, "png")
    return Image.open(io.BytesIO(file.getvalue()[:4000]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speakers": []}, "no voice"),
        ({"speakers": [Speaker(voice(0.5))] * 2}, "2 voices, but no detector here: give one face mask per voice"),
        ({"speakers": [Speaker(np.zeros(0, np.float32))]}, "voice 1: sound without a single sample"),
        ({"speakers": [Speaker(np.full(800, np.nan, np.float32))]}, "voice 1: .*NaN"),
        ({"speakers": [Speaker(np.zeros((800, 3), np.float32))]}, r"voice 1: samples are \[n\] or \[n 2\]"),
        ({"speakers": [Speaker("nowhere.wav")]}, "nowhere.wav: audio not found"),
        ({"portrait": np.zeros((4, 4, 3), np.uint8)}, "portrait: 4x4 is too small"),
        ({"portrait": np.zeros((64, 64, 2), np.uint8)}, r"portrait: \[64, 64, 2\] cannot be meant"),
        ({"portrait": "nowhere.png"}, "nowhere.png: picture not found"),
        ({"portrait": torn_picture()}, "portrait: cannot be read"),
        ({"speakers": [Speaker(voice(0.5), np.ones((40, 48, 2), bool))]}, r"mask 1: \[40, 48, 2\] cannot be meant"),
        ({"steps": 0}, "steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**70}, "seed is 1180591620717411303424"),
        ({"window": 8, "overlap": 8}, "overlap of 8"),
        ({"overlap": 2}, "overlap of 2"),
        ({"guidance_audio": float("nan")}, "guidance_audio is nan, must be a finite number"),
        ({"seconds": 0.0}, "seconds is 0.0, must"),
    ],
)
def test_bad_arguments_are_refused_before_the_long_work(avatar, monkeypatch, change, message):
    monkeypatch.setattr(avatar_module.Avatar, "denoise_stream", lambda *_, **__: pytest.fail("the long work began"))
    with pytest.raises(InputError, match=message) as caught:
        animate(avatar, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", "25", "steps is '25', must be a whole number"),
        ("steps", True, "steps is True, must be a whole number"),
        ("height", None, "height is None, must be a whole number"),
        ("shift", "x", "shift is 'x', must be a number"),
        ("dtype", "float8", "dtype is 'float8', none of float32, bfloat16"),
        ("vae", 3, "vae is 3, no VAEConfig"),
    ],
)
def test_a_config_of_other_types(avatar, tmp_path, field, value, message):
    avatar.save(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path / "model", devices=1)
    assert str(path) in str(caught.value)


def test_a_face_that_the_video_does_not_show(avatar):
    """Of a picture of 48x40 a video of 32x32 shows the columns 4..43."""
    mask = np.zeros((40, 48), bool)
    mask[:, :3] = True
    with pytest.raises(InputError, match=r"voice 1: its face lies outside the part .* that a video of 32x32 shows"):
        animate(avatar, speakers=[Speaker(voice(0.2), mask)])


def test_unknown_and_damaged_models(avatar, tmp_path):
    with pytest.raises(InputError, match=r"puppett: no such model; shipped: .*; or give a model folder"):
        find_model("puppett")
    with pytest.raises(InputError, match=r"config\.json"):
        load(tmp_path, devices=1)
    avatar.save(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    whole = weights.read_bytes()
    for length in (0, 4, 1000, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"model\.safetensors") as caught:
            load(tmp_path / "model", devices=1)
        assert "\n" not in str(caught.value)
    weights.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load(tmp_path / "model", devices=1)


def test_saved_video_holds_the_voices_at_the_length_of_the_video(tmp_path):
    video = np.zeros((25, 32, 32, 3), np.uint8)
    sound_files.write_audio(tmp_path / "a.wav", voice(2.0))
    save_video(tmp_path / "a.mp4", video, tmp_path / "a.wav")
    sound = sound_files.read_audio(tmp_path / "a.mp4")
    assert len(sound) == 16000
    assert np.corrcoef(sound, voice(2.0)[:16000])[0, 1] > 0.95
    save_video(tmp_path / "b.mp4", video, [voice(0.5), tmp_path / "a.wav"])
    both = voice(2.0)[:16000] + np.pad(voice(0.5), (0, 8000))
    assert np.corrcoef(sound_files.read_audio(tmp_path / "b.mp4"), both)[0, 1] > 0.95
    save_video(tmp_path / "c.mp4", video)
    with pytest.raises(InputError, match="no sound"):
        sound_files.read_audio(tmp_path / "c.mp4")


def tone(amplitude: float = 0.5) -> np.ndarray:
    return (amplitude * np.sin(0.1 * np.arange(16000))).astype(np.float32)


@pytest.mark.parametrize(
    "given",
    [
        lambda x: (x * 2**15).astype(np.int16),
        lambda x: jnp.asarray(x),
        lambda x: x.tolist(),
        lambda x: [x],
        lambda x: [x.tolist()],
        lambda x: x[None],
    ],
)
def test_samples_of_any_kind_are_the_sound_of_a_video(tmp_path, given):
    save_video(tmp_path / "a.mp4", np.zeros((25, 32, 32, 3), np.uint8), given(tone()))
    read = sound_files.read_audio(tmp_path / "a.mp4")
    assert np.corrcoef(read, tone())[0, 1] > 0.99
    assert read.std() == pytest.approx(tone().std(), rel=0.02)


def test_stereo_stays_stereo_in_a_video(tmp_path):
    video = np.zeros((25, 32, 32, 3), np.uint8)
    stereo = np.stack([tone(), tone(0.1)], -1)
    write_wav(tmp_path / "a.wav", (stereo * 2**15).astype(np.int16))
    for source in (stereo, stereo.T, tmp_path / "a.wav", [tmp_path / "a.wav", np.zeros(100, np.float32)]):
        save_video(tmp_path / "a.mp4", video, source)
        read = sound_files.read_audio(tmp_path / "a.mp4", stereo=True)
        np.testing.assert_allclose(read.std(axis=0), stereo.std(axis=0), rtol=0.05)
    assert (read_voice(stereo.T, "voice 1") == stereo.mean(axis=1)).all()


def test_samples_that_cannot_be_meant_are_refused_before_the_video_is_written(tmp_path, caplog):
    video = np.zeros((5, 32, 32, 3), np.uint8)
    for source, message in (
        (tone() * 2**15, "audio: samples reach 16384"),
        ([tone(), np.zeros((5, 5))], "audio 2: samples are"),
        ([1, 2, 3], "audio: samples are"),
        (3.5, "audio: samples are"),
        ([None], "audio: None cannot be meant"),
    ):
        with pytest.raises(InputError, match=message):
            save_video(tmp_path / "a.mp4", video, source)
    assert list(tmp_path.iterdir()) == []
    assert not caplog.records
    save_video(tmp_path / "a.mp4", video, tone(1.5))
    assert [record.getMessage() for record in caplog.records] == [
        "audio: reaches 1.50 times full scale, cut off at 1 in the video"
    ]


def test_the_public_names():
    assert mi_jax.load is load
    assert mi_jax.Speaker is Speaker
    assert mi_jax.Avatar is Avatar
    assert mi_jax.save_video is save_video
    assert {"load", "Avatar", "Conditions", "Speaker", "save_video", "InputError"} <= set(dir(mi_jax))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mi_jax.nothing  # noqa: B018


def test_a_voice_that_says_nothing_is_remarked_and_changes_nothing(avatar, caplog):
    mask = np.ones((40, 48), bool)
    silence = np.zeros(8000, np.float32)
    animate(avatar, speakers=[Speaker(silence, mask)])
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == ["voice 1: nothing is said in it (digital silence): lips will move by chance or not at all"]
    caplog.clear()
    animate(avatar, speakers=[Speaker(voice(SECONDS), mask)])
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]
