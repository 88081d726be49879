"""Videos: frames, colours and sound come back, and a file that cannot be written leaves the old one."""

import pathlib
from importlib import resources

import av
import numpy as np
import pytest
from PIL import Image
from tiny_media import one_line, speech_like

from mi_jax.data import video_files
from mi_jax.data.sound_files import read_audio
from mi_jax.data.sound_track import SoundTrack
from mi_jax.errors import InputError


def moving_square(frames: int, height: int, width: int) -> np.ndarray:
    video = np.full((frames, height, width, 3), (30, 60, 220), np.uint8)
    for index, frame in enumerate(video):
        frame[8:24, index : index + 16] = (200, 50, 30)
    return video


@pytest.mark.parametrize("size", [(48, 64), (47, 63)])
def test_video_round_trip_keeps_frames_colours_and_sound(tmp_path, size):
    video = moving_square(30, *size)
    audio = speech_like(1.2, 16000)[:, 0]
    video_files.write_video(tmp_path / "a.mp4", iter(video), audio)
    read, rate = video_files.read_video(tmp_path / "a.mp4")
    assert rate == 25
    assert read.shape == (30, 48, 64, 3)  # odd sides grow by one
    assert np.abs(read[:, : size[0], : size[1]].astype(int) - video).mean() < 3  # colour is at half the resolution
    assert np.abs(read[:, 40, 60].astype(int) - (30, 60, 220)).max() <= 3
    sound = read_audio(tmp_path / "a.mp4")
    assert np.corrcoef(sound[: len(audio)], audio)[0, 1] > 0.99
    assert len(sound) == len(audio)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_the_same_frames_are_the_same_file_whatever_lay_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    with resources.as_file(resources.files("mi_jax") / "assets/examples/portrait.png") as path:
        portrait = np.asarray(Image.open(path).convert("RGB").resize((544, 544)))
    frames = np.stack([portrait[index // 4 :, index // 2 :][:272, :272] for index in range(60)])
    written = set()
    for number in range(4):
        left = [rng.integers(0, 255, rng.integers(1_000, 60_000), np.uint8) for _ in range(1_500)]
        del left
        video_files.write_video(tmp_path / f"{number}.mp4", frames)
        written.add((tmp_path / f"{number}.mp4").read_bytes())
    assert len(written) == 1


def test_stereo_sound_is_written_per_channel(tmp_path):
    stereo = np.stack([speech_like(1, 16000)[:, 0], np.zeros(16000, np.float32)], -1)
    video_files.write_video(tmp_path / "a.mov", moving_square(25, 32, 48), stereo)
    with av.open(str(tmp_path / "a.mov")) as container:
        assert container.streams.audio[0].channels == 2
    np.testing.assert_allclose(read_audio(tmp_path / "a.mov")[:16000].std(), stereo[:, 0].std() / 2, rtol=0.05)


@pytest.mark.parametrize("case", ["missing folder", "folder is a file", "not writable", "is a folder", "suffix"])
def test_unwritable_video(tmp_path, case):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    path = {
        "missing folder": tmp_path / "nowhere" / "a.mp4",
        "folder is a file": tmp_path / "file" / "a.mp4",
        "not writable": pathlib.Path("/proc/a.mp4"),  # even root cannot create a file there
        "is a folder": tmp_path / "folder.mp4",
        "suffix": tmp_path / "a.txt",
    }[case]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as caught:
        video_files.write_video(path, moving_square(2, 32, 32))
    assert one_line(caught, path)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_error_midway_leaves_the_old_file(tmp_path):
    video_files.write_video(tmp_path / "a.mp4", moving_square(3, 32, 32))
    before = (tmp_path / "a.mp4").read_bytes()

    def frames():
        yield from moving_square(3, 32, 32)
        raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError, match="the model failed"):
        video_files.write_video(tmp_path / "a.mp4", frames())
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == before


def test_a_sound_track_is_written_as_the_array_of_its_samples(tmp_path, monkeypatch):
    """Also behind the last frame, where it goes on in pieces."""
    voice = speech_like(2.0, 16000, 2)
    track = SoundTrack([voice, voice[:20000, 0]], 40000)
    for number, audio in enumerate((track[:], track)):
        video_files.write_video(tmp_path / f"{number}.mp4", moving_square(3, 32, 32), audio)
        monkeypatch.setattr(video_files, "PIECE", 1000)
    assert (tmp_path / "0.mp4").read_bytes() == (tmp_path / "1.mp4").read_bytes()
    assert len(read_audio(tmp_path / "1.mp4")) == 40000


def test_sound_that_is_not_finite_is_refused_before_writing(tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        video_files.write_video(tmp_path / "a.mp4", moving_square(3, 32, 32), np.full(10, np.nan, np.float32))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, small_disk, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"old")
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)
    with pytest.raises(InputError, match="cannot be written") as caught:
        video_files.write_video(path, noise, crf=1)
    assert one_line(caught, path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("errno", [28, 122])
def test_faults_of_the_disk_under_the_muxer_are_told_from_others(tmp_path, monkeypatch, errno):
    def frames():
        yield from moving_square(2, 32, 48)
        raise OSError(errno, "No space left on device")

    with pytest.raises(InputError, match=r"a\.mp4: cannot be written \(No space left on device\)"):
        video_files.write_video(tmp_path / "a.mp4", frames())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [(96, 102), (97, 101)])
def test_the_written_size_is_what_a_player_shows(tmp_path, size):
    video_files.write_video(tmp_path / "a.mp4", np.zeros((2, *size, 3), np.uint8))
    read, _ = video_files.read_video(tmp_path / "a.mp4")
    assert read.shape[1:3] == video_files.written_size(*size)


def test_frames_that_cannot_be_decoded_are_left_out(tmp_path, caplog):
    video_files.write_video(tmp_path / "a.mkv", moving_square(20, 32, 48))
    data = bytearray((tmp_path / "a.mkv").read_bytes())
    with av.open(str(tmp_path / "a.mkv")) as container:
        packets = [(bytes(packet), packet.dts) for packet in container.demux() if packet.size]
    content, _ = packets[-1]
    start = data.rindex(content)
    data[start : start + len(content)] = b"\xff" * len(content)
    (tmp_path / "a.mkv").write_bytes(data)
    read, _ = video_files.read_video(tmp_path / "a.mkv")
    assert len(read) == 19
    (record,) = caplog.records
    assert "could not be decoded, skipped" in record.getMessage()
