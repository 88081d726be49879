"""A video that grows: watched meanwhile, cut off anywhere and gone on with, and whole in the end."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import av
import numpy as np
import pytest
from tiny_media import one_line, speech_like

from mi_jax.data import growing_video, video_files
from mi_jax.data.growing_video import GrowingVideo, kept_states, whole_frames
from mi_jax.data.sound_files import read_audio
from mi_jax.errors import InputError

SIZE = (48, 64)
SEGMENT = 20


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    monkeypatch.setattr(growing_video, "SEGMENT", SEGMENT)


def frames(count: int, first: int = 0) -> np.ndarray:
    video = np.full((count, *SIZE, 3), (30, 60, 220), np.uint8)
    for index, frame in enumerate(video, first):
        frame[8:24, index % 48 : index % 48 + 16] = (200, 50 + index % 100, 30)
    return video


def grow(video: GrowingVideo, count: int, piece: int = 7) -> None:
    """Writes frames up to number `count`, and keeps a state whenever it may."""
    while video.frames < count:
        video.write(frames(min(piece, count - video.frames), video.frames))
        if video.segment_is_long:
            video.keep({"place": np.array(video.frames)})


def decoded(path) -> np.ndarray:
    return video_files.read_video(path)[0]


def make(path, **options) -> GrowingVideo:
    return GrowingVideo(path, *SIZE, speech_like(5, 16000)[:, 0], request={"seed": 1}, **options)


def broken_off(path, count: int, fault: BaseException | type = KeyboardInterrupt, **options) -> None:
    with make(path, **options) as video:
        grow(video, count)
        raise fault


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_the_end_is_a_video_like_any_other(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    with make(path) as video:
        grow(video, 125)
        video.finish()
    assert list(tmp_path.iterdir()) == [path]
    read = decoded(path)
    assert read.shape == (125, *SIZE, 3)
    assert np.abs(read.astype(int) - frames(125)).mean() < 3
    sound, told = read_audio(path), speech_like(5, 16000)[:, 0]
    assert 0 <= len(sound) - len(told) < (1024 if suffix == ".mkv" else 1)  # Matroska keeps whole blocks of AAC
    assert np.corrcoef(sound[: len(told)], told)[0, 1] > 0.99
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 25
        assert container.duration / 1e6 == pytest.approx(5, abs=0.07)
        assert [frame.pts * frame.time_base * 25 for frame in container.decode(video=0)] == list(range(125))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_it_can_be_watched_while_it_grows(tmp_path, suffix):
    part = tmp_path / f"a{suffix}.partial" / f"video{suffix}"
    with make(tmp_path / f"a{suffix}") as video:
        grow(video, 90)
        seen = decoded(part)
        sound = read_audio(part)
    assert 2 * SEGMENT < len(seen) <= 90
    assert np.abs(seen.astype(int) - frames(len(seen))).mean() < 3
    assert len(sound) > 16000
    assert decoded(part).shape[0] == 90  # left before the end, it holds what the encoder had, too


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_video_that_was_gone_on_with_has_the_same_frames(tmp_path, suffix):
    with make(tmp_path / f"whole{suffix}") as video:
        grow(video, 125)
        video.finish()
    path = tmp_path / f"a{suffix}"
    for end in (50, 100):
        with pytest.raises(KeyboardInterrupt):
            broken_off(path, end, resume=end > 50)
    with make(path, resume=True) as video:
        assert video.state["place"] == video.frames == 84
        grow(video, 125)
        video.finish()
    np.testing.assert_array_equal(decoded(path), decoded(tmp_path / f"whole{suffix}"))
    np.testing.assert_array_equal(read_audio(path), read_audio(tmp_path / f"whole{suffix}"))
    assert len(list(tmp_path.iterdir())) == 2


PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv[2])
import test_growing_video as t
t.growing_video.SEGMENT = t.SEGMENT
with t.make(sys.argv[1]) as video:
    t.grow(video, 80)
    print("written", flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_killed_writer_leaves_a_playable_file_that_can_be_gone_on_with(tmp_path):
    path, here = tmp_path / "a.mp4", pathlib.Path(__file__).parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(path), str(here)], capture_output=True, env=env, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    part = tmp_path / "a.mp4.partial" / "video.mp4"
    assert len(decoded(part)) >= 2 * SEGMENT
    with make(path, resume=True) as video:
        assert video.frames in (42, 63)
        assert video.state["place"] == video.frames
        grow(video, 125)
        video.finish()
    with make(tmp_path / "whole.mp4") as video:
        grow(video, 125)
        video.finish()
    np.testing.assert_array_equal(decoded(path), decoded(tmp_path / "whole.mp4"))


@pytest.mark.parametrize("cut", [0.1, 0.4, 0.6, 0.8, 0.99])
def test_a_file_that_ends_anywhere_is_gone_on_with_from_a_state_that_it_holds(tmp_path, cut):
    path = tmp_path / "a.mp4"
    with pytest.raises(KeyboardInterrupt):
        broken_off(path, 110)
    part = tmp_path / "a.mp4.partial" / "video.mp4"
    os.truncate(part, int(cut * part.stat().st_size))
    whole = whole_frames(part)
    with make(path, resume=True) as video:
        assert video.frames in ([0] if whole < 84 else [84, 105])
        assert video.frames <= whole
        grow(video, 125)
        video.finish()
    assert decoded(path).shape[0] == 125


def test_what_fails_before_a_segment_is_whole_leaves_nothing(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"precious")
    with pytest.raises(InputError, match=r"^no more$"):
        broken_off(tmp_path / "a.mp4", 19, InputError("no more"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"precious"


def test_an_unfinished_video_is_not_thrown_away_nor_gone_on_with_as_another(tmp_path):
    path = tmp_path / "a.mp4"
    with pytest.raises(InputError, match=r"nothing to resume, there is no .*a\.mp4\.partial"):
        make(path, resume=True)
    with pytest.raises(InputError, match=r"^no more; .*video\.mp4 holds what was made so far, 1\.7 s"):
        broken_off(path, 45, InputError("no more"))
    with pytest.raises(InputError, match=r"holds 1\.7 s of a video that an earlier run did not finish"):
        make(path)
    with pytest.raises(InputError, match="was made with other prompt, seed; resume with the same"):
        GrowingVideo(path, *SIZE, request={"seed": 2, "prompt": ""}, resume=True)
    assert [frames for frames, _ in kept_states(tmp_path / "a.mp4.partial")] == [21, 42]
    assert json.loads((tmp_path / "a.mp4.partial" / "request.json").read_text()) == {"seed": 1}


def test_a_resume_that_is_broken_off_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    with pytest.raises(KeyboardInterrupt):
        broken_off(path, 110)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(GrowingVideo, "_copy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(path, resume=True)
    with make(path, resume=True) as video:
        assert video.frames == 105


@pytest.mark.parametrize("damage", ["empty state", "state that is a folder", "no video"])
def test_what_is_damaged_is_gone_on_with_from_before(tmp_path, damage, caplog):
    path, folder = tmp_path / "a.mp4", tmp_path / "a.mp4.partial"
    with pytest.raises(KeyboardInterrupt):
        broken_off(path, 110)
    if damage == "empty state":
        (folder / "105.npz").write_bytes(b"")
    elif damage == "state that is a folder":
        (folder / "700.npz").mkdir()
    else:
        (folder / "video.mp4").unlink()
    with make(path, resume=True) as video:
        assert video.frames == {"empty state": 84, "state that is a folder": 105, "no video": 0}[damage]
        assert ("begun anew" in caplog.text) == (damage == "no video")


@pytest.mark.parametrize("text", [b"", b"[1]", b"\xff\xfe"])
def test_a_request_that_is_damaged(tmp_path, text):
    with pytest.raises(KeyboardInterrupt):
        broken_off(tmp_path / "a.mp4", 50)
    (tmp_path / "a.mp4.partial" / "request.json").write_bytes(text)
    with pytest.raises(InputError, match=r"request\.json: damaged"):
        make(tmp_path / "a.mp4", resume=True)


def test_what_is_not_ours_is_left_alone(tmp_path):
    folder = tmp_path / "a.mp4.partial"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="is there, and no unfinished video; move it away"):
        make(tmp_path / "a.mp4")
    assert (folder / "mine.txt").read_text() == "mine"
    (tmp_path / "b.mp4.partial").write_text("a file")
    with pytest.raises(InputError, match="is there, and no unfinished video"):
        make(tmp_path / "b.mp4")
    with pytest.raises(InputError, match="cannot be written"):
        make(tmp_path / ("x" * 245 + ".mp4"))


def test_frames_that_are_lost_at_the_end_are_said(tmp_path):
    with make(tmp_path / "a.mp4") as video:
        grow(video, 125)
        video._end_segment()
        video._container.close()
        part = tmp_path / "a.mp4.partial" / "video.mp4"
        os.truncate(part, part.stat().st_size // 2)
        with pytest.raises(InputError, match=r"video\.mp4: holds \d+ of the 125 frames"):
            video.finish()


def test_two_writers_of_one_video(tmp_path):
    with make(tmp_path / "a.mp4") as video:
        with pytest.raises(InputError, match="a video is under way there"):
            make(tmp_path / "a.mp4")
        grow(video, 10)
        video.finish()


def test_a_full_disk_leaves_a_playable_file(small_disk, tmp_path):
    path = tmp_path / "a.mp4"
    with pytest.raises(InputError) as caught, GrowingVideo(path, *SIZE) as video:
        grow(video, 10_000)
    assert one_line(caught, path)
    assert re.search(r"a\.mp4: cannot be written .*; .*video\.mp4 holds what was made so far", str(caught.value))
    assert len(decoded(tmp_path / "a.mp4.partial" / "video.mp4")) >= SEGMENT
