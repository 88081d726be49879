"""The Python surface given what callers have: it is understood, or refused in a line that says what is wanted."""

import datetime
import pathlib

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from PIL import Image
from tiny_avatar import make_avatar, portrait, voice

import mi_jax
from mi_jax.data import pictures, sound_files, video_files
from mi_jax.errors import InputError
from mi_jax.sample.avatar import Avatar
from mi_jax.sample.inputs import Speaker, read_speakers

SOUND = voice(0.3)
MASK = np.ones((40, 48), bool)


@pytest.fixture(autouse=True, scope="module")
def as_users_call_it():
    """Types of arguments are checked in tests alone: here they must not be."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def avatar() -> Avatar:
    return make_avatar()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("files")
    pictures.write_image(folder / "portrait.png", portrait())
    pictures.write_image(folder / "mask.png", MASK.astype(np.uint8) * 255)
    sound_files.write_audio(folder / "speech.wav", SOUND)
    return folder


def animate(avatar: Avatar, **changes) -> np.ndarray:
    call = {"portrait": portrait(), "speakers": [Speaker(SOUND, MASK)], "prompt": "", "steps": 2, "guidance_audio": 0.0}
    return avatar.animate(**(call | changes))


@pytest.fixture(scope="module")
def video(avatar) -> np.ndarray:
    return animate(avatar)


UNDERSTOOD = {
    "a lone speaker": {"speakers": Speaker(SOUND, MASK)},
    "a tuple": {"speakers": (Speaker(SOUND, MASK),)},
    "a generator": {"speakers": (Speaker(SOUND, MASK) for _ in range(1))},
    "no prompt": {"prompt": None},
    "a mask of PIL": {"speakers": [Speaker(SOUND, Image.fromarray(MASK))]},
    "a mask of JAX, of numbers": {"speakers": [Speaker(SOUND, jnp.ones((40, 48)))]},
    "samples of JAX": {"speakers": [Speaker(jnp.asarray(SOUND), MASK)]},
    "a list of samples": {"speakers": [Speaker(SOUND.tolist(), MASK)]},
    "a picture of PIL": {"portrait": Image.fromarray(portrait())},
    "a picture of JAX, of floats": {"portrait": jnp.asarray(portrait() / np.float32(255))},
    "a picture, channels first": {"portrait": portrait().transpose(2, 0, 1)},
    "numbers of NumPy": {"seed": np.uint8(0), "steps": np.int64(2), "seconds": np.float32(0.3), "window": np.int32(33)},
}


@pytest.mark.parametrize("kind", UNDERSTOOD)
def test_what_can_be_meant_is_understood(avatar, video, kind):
    np.testing.assert_array_equal(animate(avatar, **UNDERSTOOD[kind]), video)


def test_a_moment_is_a_frame(avatar, caplog):
    """However short: with the sound of one frame, not with none, which would be remarked."""
    assert animate(avatar, seconds=1e-5).shape == (1, 32, 32, 3)
    assert not caplog.records


def test_a_mask_of_another_size_is_said(avatar, caplog):
    with caplog.at_level("INFO", "mi_jax"):
        animate(avatar, speakers=[Speaker(SOUND, MASK.T)])
    assert "face mask: given (mask 1 resized from 40x48 to 48x40)" in caplog.text


def test_speakers_of_every_kind(files):
    """Without a mask their faces are looked for."""
    path = files / "speech.wav"
    for one in (path, str(path), [path], SOUND, [SOUND], SOUND.tolist(), (x for x in [SOUND])):
        (speaker,) = read_speakers(one)
        assert speaker.mask is None
    assert read_speakers(None) == read_speakers([]) == []
    assert read_speakers(["a.wav", Speaker("b.wav", "m.png")]) == [Speaker("a.wav"), Speaker("b.wav", "m.png")]
    assert len(read_speakers([SOUND, SOUND.tolist()])) == 2


REFUSED = [
    ({"portrait": b"png"}, "portrait: bytes cannot be meant: give a picture file"),
    ({"portrait": 3}, "portrait: "),
    ({"portrait": "no.png"}, "no.png: picture not found"),
    ({"portrait": portrait().astype(float)}, "portrait: pixels reach from 0 to "),
    ({"speakers": {"audio": SOUND}}, "speakers is a mapping: give a list of mi_jax.Speaker"),
    ({"speakers": 3}, "voice 1: "),
    ({"speakers": [None]}, "voice 1: None cannot be meant: give a sound file, or samples at 16 kHz"),
    ({"speakers": "no.wav"}, "no.wav: audio not found"),
    ({"speakers": b"RIFF"}, "voice 1: bytes cannot be meant"),
    ({"speakers": [Speaker({"a": 1}, MASK)]}, "voice 1: dict cannot be meant"),
    ({"speakers": [Speaker(SOUND, mask=3)]}, "mask 1: "),
    ({"speakers": [Speaker(SOUND, mask="no.png")]}, "no.png: mask not found"),
    ({"prompt": 3}, "prompt: a sentence is needed, this is int"),
    ({"prompt": ["She nods."]}, "prompt: a sentence is needed, this is list"),
    ({"seed": 1.5}, "seed is 1.5, must be a whole number"),
    ({"seed": None}, "seed is None, must be a whole number"),
    ({"seed": -1}, "seed is -1, must"),
    ({"steps": "2"}, "AvatarConfig.steps is '2', must be a whole number"),
    ({"steps": True}, "AvatarConfig.steps is True"),
    ({"steps": 0}, "AvatarConfig.steps is 0"),
    ({"guidance_audio": "strong"}, "AvatarConfig.guidance_audio is 'strong', must be a number"),
    ({"guidance_text": np.nan}, "AvatarConfig.guidance_text is nan"),
    ({"height": 32.0}, "AvatarConfig.height is 32.0, must be a whole number"),
    ({"width": [32]}, "AvatarConfig.width is [32]"),
    ({"seconds": "3"}, "seconds is '3', must be a number"),
    ({"seconds": datetime.timedelta(seconds=3)}, "seconds is datetime"),
    ({"seconds": np.inf}, "seconds is inf, must be a finite number"),
    ({"window": "33"}, "window is '33', must be a whole number"),
    ({"window": 9.0}, "window is 9.0, must be a whole number"),
    ({"overlap": "8"}, "overlap is '8', must be a whole number"),
    ({"overlap": None}, "overlap is None, must be a whole number"),
    ({"face_model": 3}, "face_model is 3, must be a file"),
    ({"progress": True}, "progress is True, must be called"),
]


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=[str(list(change)) for change, _ in REFUSED])
def test_what_cannot_be_meant_is_one_line(avatar, change, said):
    with pytest.raises(InputError) as fault:
        animate(avatar, **change)
    assert str(fault.value).startswith(said), str(fault.value)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: mi_jax.load(None), "load takes the name of a shipped model or a folder, not None"),
        (lambda: mi_jax.load(3), "load takes the name"),
        (lambda: mi_jax.load(""), "load takes the name"),
        (lambda: mi_jax.load("puppet", devices="2"), "devices is '2', must be a whole number"),
        (lambda: mi_jax.load("puppet", devices=99), "devices is 99, but there are"),
        (lambda: mi_jax.load("puppet", seq=1.0), "seq is 1.0, must be a whole number"),
        (lambda: mi_jax.load("puppet", mesh=(2, 4)), "mesh is (2, 4), must be of mi_jax.mesh.make_mesh"),
    ],
)
def test_models_that_cannot_be_meant(call, said):
    with pytest.raises(InputError) as fault:
        call()
    assert str(fault.value).startswith(said), str(fault.value)


def test_videos_and_sounds_that_are_saved(video, files, tmp_path):
    kinds = [video, jnp.asarray(video), video / 255, list(video), [Image.fromarray(frame) for frame in video]]
    sounds = [SOUND, [SOUND], Speaker(SOUND, MASK), [Speaker(SOUND)], jnp.asarray(SOUND)]
    for number, (frames, sound) in enumerate(zip(kinds, sounds, strict=True)):
        mi_jax.save_video(str(tmp_path / f"{number}.mp4"), frames, sound)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    for path, frames, sound, said in (
        (None, video, None, "save_video: None is no path"),
        (tmp_path / "x.mp4", None, None, "video: None cannot be meant"),
        (tmp_path / "x.mp4", video[0], None, "video: [32, 32, 3] cannot be meant"),
        (tmp_path / "x.mp4", video, object(), "audio: object cannot be meant"),
        (tmp_path / "x.mp4", video, {"a": 1}, "audio: "),
        (tmp_path / "x.gif", None, None, f"{tmp_path / 'x.gif'}: the name of a video must end in"),
    ):
        with pytest.raises(InputError) as fault:
            mi_jax.save_video(path, frames, sound)
        assert str(fault.value).startswith(said), str(fault.value)
    assert video_files.check_video_path(tmp_path / "0.mp4").exists()
    assert not (tmp_path / "x.mp4").exists()
