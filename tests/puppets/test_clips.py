"""Puppets: the same everywhere, true to their own records, and complete on disk."""

import concurrent.futures
import dataclasses
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mi_jax.data import sound_files, video_files
from mi_jax.errors import InputError
from mi_jax.puppets.clips import SPLITS, Clip, draw, draw_portrait, write_puppets
from mi_jax.puppets.face import mouth_curves
from mi_jax.puppets.groups import draw_duet, draw_trio
from mi_jax.puppets.looks import sample_look
from mi_jax.puppets.motion import EXPRESSIONS, HEAD_MOTIONS, Direction, compose, move
from mi_jax.puppets.prompts import MAX_WORDS, vocabulary, words
from mi_jax.puppets.reading import correlation, mouth_opening
from mi_jax.puppets.sentences import TEST, TRAIN, WIDE
from mi_jax.puppets.speech import (
    OPEN,
    PHONEME_CLASSES,
    SILENCE,
    _split,
    mouth_track,
    phoneme_steps,
    sample_voice,
    speak,
    voices,
)

SECONDS = 1.64  # 41 frames


def _digest(clip: Clip) -> str:
    parts = (clip.video, clip.audio, clip.mouth, clip.mask)
    text = json.dumps([clip.prompt, clip.attributes, clip.phonemes], sort_keys=True)
    return hashlib.sha256(b"".join(p.tobytes() for p in parts) + text.encode()).hexdigest()


def _draw_digest(index: int) -> str:
    return _digest(draw(index, seed=5, seconds=SECONDS, size=64))


def test_the_same_index_gives_the_same_bits_in_any_order_thread_and_process():
    first = [_draw_digest(i) for i in range(4)]
    assert [_draw_digest(i) for i in reversed(range(4))] == first[::-1]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(_draw_digest, range(4))) == first
    script = (
        "import json, hashlib\nfrom mi_jax.puppets.clips import draw\nout = []\nfor i in (3, 1):\n"
        f"    c = draw(i, seed=5, seconds={SECONDS}, size=64)\n"
        "    t = json.dumps([c.prompt, c.attributes, c.phonemes], sort_keys=True)\n"
        "    b = b''.join(p.tobytes() for p in (c.video, c.audio, c.mouth, c.mask))\n"
        "    out.append(hashlib.sha256(b + t.encode()).hexdigest())\nprint(json.dumps(out))\n"
    )
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert json.loads(printed) == [first[3], first[1]]


@pytest.mark.parametrize("other", [{"seed": 6}, {"split": "test"}, {"index": 1}])
def test_seed_split_and_index_each_give_another_puppet(other):
    choice = {"index": 0, "seed": 5, "split": "train"} | other
    base = draw_portrait(0, seed=5, size=64)[2]
    assert draw_portrait(choice.pop("index"), **choice, size=64)[2]["look"] != base["look"]


def test_training_and_test_share_no_voice_and_no_sentence():
    assert not voices("train") & voices("test")
    assert not voices("wide") & voices("test")
    assert voices("train") < voices("wide")
    languages = [{name for grammar in table.values() for name in grammar.voices} for table in (WIDE, TEST)]
    assert not languages[0] & languages[1]
    train, test = (
        {phrase for g in table.values() for field in (g.subjects, g.verbs, g.objects) for phrase in field}
        for table in (TRAIN, TEST)
    )
    # A sentence holds a subject and an object; none of these are shared, in any language.
    assert {p for p in train & test if " " in p} == set()
    said = [
        {draw(i, split=split, seconds=3.0, size=32, window=(0, 1)).attributes["text"] for i in range(12)}
        for split in SPLITS
    ]
    assert len(said[0] | said[1]) == 24


def test_every_voice_that_is_listened_to_speaks():
    """espeak-ng takes a throat that it does not know for none, and some of its languages lack a dictionary or IPA."""
    voice = sample_voice(np.random.default_rng(0), "wide")

    def said(language, name):
        told = dataclasses.replace(voice, language=language, name=name, noise=0.0)
        return speak(np.random.default_rng(1), told, 4.0, "wide")

    throats = {name.partition("+")[2] for name in voices("wide")}
    heard = {said("German", f"de+{throat}" if throat else "de").audio.tobytes() for throat in throats}
    assert len(heard) == len(throats) == 16 + 43
    for language, grammar in WIDE.items():
        phonemes = said(language, grammar.voices[0]).phonemes
        silent = sum(end - start for start, end, kind in phonemes if kind == SILENCE)
        assert silent < 0.6 * 4.0, language
        assert len({kind for _, _, kind in phonemes}) >= 8, language


@pytest.mark.parametrize(("seconds", "frames"), [(5.16, 129), (1.64, 41), (1.0, 25), (0.4, 9), (0.04, 1), (2.0, 49)])
def test_frames_are_4k_plus_1_and_sound_is_exactly_as_long(seconds, frames):
    clip = draw(2, seconds=seconds, size=64)
    assert clip.video.shape == (frames, 64, 64, 3)
    assert clip.audio.shape == (frames * 640,)
    assert clip.mouth.shape == (frames, 4)
    assert np.abs(clip.audio).max() <= 1
    assert clip.phonemes[0][0] == 0
    assert clip.phonemes[-1][1] == pytest.approx(frames / 25)
    assert all(a[1] == b[0] for a, b in zip(clip.phonemes[:-1], clip.phonemes[1:]))


def test_a_window_is_a_cut_of_the_whole_clip():
    whole, part = draw(7, seconds=SECONDS), draw(7, seconds=SECONDS, window=(9, 22))
    np.testing.assert_array_equal(part.video, whole.video[9:22])
    np.testing.assert_array_equal(part.audio, whole.audio[9 * 640 : 22 * 640])
    np.testing.assert_allclose(part.mouth, whole.mouth[9:22], atol=1e-6)
    steps = phoneme_steps(whole.phonemes, 41)[18:44]
    np.testing.assert_array_equal(phoneme_steps(part.phonemes, 13), steps)


def test_the_portrait_function_shows_frame_0_and_tells_the_same_prompt():
    for index in range(6):
        clip = draw(index, seconds=0.36)
        picture, prompt, attributes = draw_portrait(index)
        assert prompt == clip.prompt
        assert attributes["look"] == clip.attributes["look"]
        _, _, x, y = clip.mouth[0] * 96  # only the mouth may differ: the voice may begin at once
        row, column = np.nonzero((picture != clip.video[0]).any(-1))
        assert (np.hypot(row - y, column - x) < 96 * 0.4 * attributes["look"]["half_height"]).all()


def test_frame_0_is_at_rest_whatever_is_directed():
    mouth = np.zeros(30), np.ones(30), np.zeros(30)
    rests, later = [], []
    for expression in EXPRESSIONS:
        for motion in HEAD_MOTIONS:
            direction = Direction(expression=expression, head_motion=motion, tempo="quick", period=1.2, amplitude=0.3)
            pose = move(np.random.default_rng(0), direction, mouth)
            rests.append([float(getattr(pose, name)[0]) for name in pose.__dataclass_fields__])
            later.append(tuple(round(float(getattr(pose, name)[12]), 6) for name in pose.__dataclass_fields__))
    np.testing.assert_allclose(rests, np.broadcast_to(rests[0], np.shape(rests)), atol=1e-9)
    assert len(set(later)) == len(later)


def test_lips_close_on_m_b_p_and_open_on_a():
    """Taken over phonemes long enough to be seen (a frame and a half), in voices of both splits."""
    closed, opened, rounded, spread = [], [], [], []
    for seed in range(12):
        rng, split = np.random.default_rng(seed), SPLITS[seed % 2]
        speech = speak(rng, sample_voice(rng, split), 5.16, split)
        opening, wide, round_ = mouth_track(speech, 129)
        for start, end, kind in speech.phonemes:
            frame = int((start + end) / 2 * 25)
            if end - start < 0.06 or frame >= 129:
                continue
            name = PHONEME_CLASSES[kind]
            if name == "m b p":
                closed.append(opening[frame])
            elif name == "a":
                opened.append(opening[frame])
            elif name in ("o", "u"):
                rounded.append((wide[frame], round_[frame]))
            elif name in ("i", "e"):
                spread.append((wide[frame], round_[frame]))
    assert min(len(closed), len(opened), len(rounded), len(spread)) > 20
    assert np.median(closed) == 0
    assert np.quantile(closed, 0.9) < 0.1
    assert np.quantile(opened, 0.1) > 0.6
    (round_wide, roundness), (spread_wide, spreadness) = np.median(rounded, 0), np.median(spread, 0)
    assert round_wide < 0.8 < 1.1 < spread_wide
    assert roundness > 0.7 > 0.3 > spreadness


def test_sound_is_where_the_phonemes_are():
    """Vowels are loud and silences silent: the timings belong to the sound."""
    loud, quiet = [], []
    for seed in range(8):
        rng = np.random.default_rng(100 + seed)
        voice = sample_voice(rng, "train")
        speech = speak(rng, voice, 3.0, "train")
        if voice.noise:
            continue
        for start, end, kind in speech.phonemes:
            sound = speech.audio[int(start * 16000) : int(end * 16000)]
            if len(sound) > 800:
                (loud if kind == OPEN else quiet if kind == SILENCE else []).append(
                    np.sqrt(np.mean(sound**2)) / voice.level
                )
    assert np.median(loud) > 0.8
    assert np.median(quiet) < 0.02


def test_diphthongs_and_affricates_are_shared_out():
    classes = PHONEME_CLASSES
    parts = _split("ˈaɪ", 1.0, 1.2)
    assert [classes[k] for *_, k in parts] == ["a", "i"]
    assert parts[0][1] == pytest.approx(1.1)
    assert [classes[k] for *_, k in _split("tʃ", 0, 1)] == ["t d n l", "sh"]
    assert _split("ɔːɹ", 0, 3)[0][1] == pytest.approx(2)
    assert [classes[k] for *_, k in _split("", 0, 1)] == ["silence"]


def test_recorded_mouth_is_the_mouth_in_the_pixels():
    scores = []
    for index in range(12):
        clip = draw(index, split=SPLITS[index % 2], seconds=2.6)
        scores.append(correlation(mouth_opening(clip.video, clip.attributes), clip.mouth[:, 0]))
    assert np.median(scores) >= 0.98
    assert min(scores) >= 0.95


def test_masks_of_frames_are_the_face_in_each_and_the_clips_mask_is_their_union():
    for make in (draw, draw_duet):
        clip, moving = (make(1, seed=5, seconds=SECONDS, size=64, moving_masks=m) for m in (False, True))
        np.testing.assert_array_equal(moving.video, clip.video)
        frames = moving.mask.reshape(-1, *moving.mask.shape[-3:])
        assert frames.shape[1:] == clip.video.shape[:-1]
        np.testing.assert_array_equal(frames.any(1).reshape(clip.mask.shape), clip.mask)
        assert (frames != frames[:, :1]).any()
    moving = draw(1, seed=5, seconds=SECONDS, size=64, moving_masks=True)
    for frame in (0, 17, 40):  # a clip of one frame has that frame's mask
        alone = draw(1, seed=5, seconds=SECONDS, size=64, window=(frame, frame + 1))
        np.testing.assert_array_equal(moving.mask[frame], alone.mask)


def test_mask_holds_the_mouth_of_every_frame():
    for index in range(10):
        clip = draw(index, seconds=SECONDS, size=64)
        _, width, x, y = clip.mouth.T
        for dx in (-0.5, 0, 0.5):
            column, row = ((x + dx * width) * 64).astype(int), (y * 64).astype(int)
            assert clip.mask[row, column].all()
        assert 0.1 < clip.mask.mean() < 0.8


def test_lips_never_cross():
    rng = np.random.default_rng(0)
    for _ in range(20):
        look = sample_look(rng)
        opening = rng.uniform(0, 1, 16)
        pose = compose("happy", 1.0, 0.0, 0.0, 0.0, (opening, np.ones(16), rng.uniform(0, 1, 16)))
        _, upper, lower = mouth_curves(look, pose)
        assert (upper <= lower + 1e-12).all()
        middle = (lower - upper)[:, upper.shape[1] // 2]
        np.testing.assert_allclose(middle, look.mouth_open * opening, rtol=1e-6)


def test_prompts_name_what_they_direct_in_words_of_the_vocabulary():
    known, texts = set(vocabulary()), set()
    signs = {
        "happy": r"happ|cheer|joy|smil", "sad": r"sad|unhapp|sorrow|tears", "angry": r"angr|anger|furious|knitted",
        "surprised": r"surpris|amazed|astonished|raised eyebrows|wide open",
        "turning": r"side to side|left and right|shaking", "nodding": r"nod|up and down",
        "tilting": r"tilt|leaning", "slow": "slowly|gently|unhurriedly", "quick": "quickly|fast|briskly",
        "left": r"left\b|leftwards|right to left", "right": r"right\b|rightwards|left to right",
        "down": "fall|down|sink", "up": "ris|up",
    }  # fmt: skip
    import re

    for index in range(80):
        _, prompt, attributes = draw_portrait(index, size=16)
        texts.add(prompt)
        assert set(words(prompt)) <= known
        assert len(words(prompt)) <= MAX_WORDS
        told = [attributes["expression"], attributes["head_motion"], attributes["background_motion"]]
        if attributes["head_motion"] != "still":
            told.append(attributes["direction"]["tempo"])
        for value in told:
            if value in signs:
                assert re.search(signs[value], prompt.lower()), (value, prompt)
    assert len(texts) > 74


def test_files_are_written_complete(tmp_path):
    folders = write_puppets(tmp_path / "out", 2, seed=3, seconds=1.0, progress=False)
    assert [f.name for f in folders] == ["00000", "00001"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["00000", "00001"]
    names = ["attributes.json", "mask.png", "mouth.csv", "portrait.png", "prompt.txt", "speech.wav", "video.mp4"]
    assert [sorted(p.name for p in f.iterdir()) for f in folders] == [names, names]
    clip = draw(1, seed=3, seconds=1.0)
    folder = folders[1]
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "portrait.png")), clip.video[0])
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "mask.png")) > 0, clip.mask)
    assert (folder / "prompt.txt").read_text().strip() == clip.prompt
    assert (folder / "mouth.csv").read_text().splitlines()[0] == "frame,opening,width,x,y"
    table = np.loadtxt(folder / "mouth.csv", delimiter=",", skiprows=1)
    np.testing.assert_array_equal(table[:, 0], np.arange(25))
    np.testing.assert_allclose(table[:, 1:], clip.mouth, atol=1e-5)
    np.testing.assert_allclose(sound_files.read_audio(folder / "speech.wav"), clip.audio, atol=1e-4)
    assert json.loads((folder / "attributes.json").read_text()) == json.loads(json.dumps(clip.attributes))
    assert (folder / "video.mp4").stat().st_size > 5000


def test_a_failure_leaves_no_half_written_clip(tmp_path, monkeypatch):
    real, calls = video_files.write_video, []

    def fails_on_the_second(path, *args, **kwargs):
        calls.append(path)
        if len(calls) == 2:
            raise OSError("disk full")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(video_files, "write_video", fails_on_the_second)
    with pytest.raises(OSError, match="disk full"):
        write_puppets(tmp_path, 3, seed=0, seconds=0.4, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["00000"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"count": 0}, "--count"), ({"seconds": 0.0}, "--seconds"), ({"out_dir": "file"}, "file")],
)
def test_bad_arguments_are_named(tmp_path, arguments, message):
    (tmp_path / "file").write_text("in the way")
    call = {"out_dir": tmp_path / "out", "count": 1, "seed": 0, "seconds": 0.4, "progress": False} | arguments
    call["out_dir"] = tmp_path / call["out_dir"]
    with pytest.raises(InputError, match=message):
        write_puppets(**call)
    with pytest.raises(InputError, match="split"):
        draw(0, split="validation")
    with pytest.raises(InputError, match="window"):
        draw(0, seconds=0.36, window=(4, 40))


# --- Duets and trios


@pytest.mark.parametrize(
    ("make", "count", "least", "overlap", "most"), [(draw_duet, 2, 0.97, 0.05, 3), (draw_trio, 3, 0.75, 0.08, 4)]
)
def test_groups_take_turns_and_read_as_puppets_of_their_own(make, count, least, overlap, most):
    """The mouths of three are three pixels high, and shut most of the time."""
    together = 0
    for index in range(8):
        group = make(index, split="test", seconds=3.24)
        assert group.video.shape == (81, 96, 96, 3)
        assert group.audio.shape == (count, 81 * 640)
        x = group.mouth[:, :, 2]
        np.testing.assert_allclose(x.mean(1), (np.arange(count) + 0.5) / count, atol=0.05)
        for left in range(count - 1):
            assert (group.mask[left] & group.mask[left + 1]).mean() < 0.002
            assert x[left].max() < (left + 1) / count < x[left + 1].min()
        for attributes, mouth in zip(group.attributes, group.mouth):
            assert correlation(mouth_opening(group.video, attributes), mouth[:, 0]) > least
        heard = np.abs(group.audio.reshape(count, 81, 640)).max(-1) > 0.02
        together += bool((heard.mean(1) > 0.65).all())
        if not (heard.mean(1) > 0.65).all():
            assert (heard.sum(0) > 1).mean() < overlap  # turns do not
    assert 1 <= together <= most  # a quarter of many


def test_a_duet_is_the_same_again_and_written_by_speaker(tmp_path):
    (folder,) = write_puppets(tmp_path, 1, 3, 1.0, duets=True, progress=False)
    duet = draw_duet(0, seed=3, seconds=1.0)
    names = {path.name for path in folder.iterdir()}
    each = {
        f"{name}_{k}.{kind}" for name, kind in (("mask", "png"), ("speech", "wav"), ("mouth", "csv")) for k in (1, 2)
    }
    assert names == each | {"portrait.png", "prompt.txt", "video.mp4", "attributes.json"}
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "portrait.png")), duet.video[0])
    for k in range(2):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / f"mask_{k + 1}.png")) > 0, duet.mask[k])
        np.testing.assert_allclose(sound_files.read_audio(folder / f"speech_{k + 1}.wav"), duet.audio[k], atol=1e-4)
        table = np.loadtxt(folder / f"mouth_{k + 1}.csv", delimiter=",", skiprows=1)
        np.testing.assert_allclose(table[:, 1:], duet.mouth[k], atol=1e-5)
