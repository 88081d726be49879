"""Sound files: level and time are kept, what is damaged or odd is read as far as it can be, the rest is refused."""

import io
import logging
import os
import pathlib
import shutil
import tempfile
import tracemalloc
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
import soxr
from PIL import Image
from tiny_media import encode_sound, lag_and_correlation, one_line, speech_like, write_wav

from mi_jax.data import pieces, sound, sound_files, spool
from mi_jax.data.samples import mono, samples_from
from mi_jax.data.video_files import write_video
from mi_jax.errors import InputError


@pytest.mark.parametrize(
    ("suffix", "codec", "rate", "layout", "sample_format"),
    [
        ("wav", "pcm_s16le", 16000, "mono", "s16"),
        ("wav", "pcm_u8", 8000, "mono", "u8"),
        ("wav", "pcm_f32le", 44100, "stereo", "flt"),
        ("wav", "pcm_s24le", 48000, "stereo", "s32"),
        ("flac", "flac", 22050, "stereo", "s16"),
        ("mp3", "libmp3lame", 44100, "stereo", "fltp"),
        ("m4a", "aac", 48000, "mono", "fltp"),
        ("ogg", "libopus", 48000, "mono", "flt"),
    ],
)
def test_sound_of_any_rate_and_layout_keeps_level_and_time(tmp_path, suffix, codec, rate, layout, sample_format):
    path = tmp_path / f"a.{suffix}"
    channels = {"mono": 1, "stereo": 2}[layout]
    truth = speech_like(1.5, rate, channels)
    encode_sound(path, codec, truth, rate, layout, sample_format)
    read = sound_files.read_audio(path)
    assert len(read) == 24000
    expected = soxr.resample(truth[:, 0], rate, 16000)
    lag, correlation = lag_and_correlation(read, expected)
    assert lag == 0
    assert correlation > 0.97
    assert np.std(read) == pytest.approx(np.std(expected), rel=0.05)


def test_channels_are_averaged(tmp_path):
    stereo = np.stack([np.full(1600, 0.5), np.full(1600, -0.1)], -1).astype(np.float32)
    encode_sound(tmp_path / "a.wav", "pcm_f32le", stereo, 16000, "stereo", "flt")
    np.testing.assert_allclose(sound_files.read_audio(tmp_path / "a.wav"), 0.2, atol=1e-6)


def test_written_sound_is_read_back(tmp_path):
    audio = speech_like(0.5, 16000)[:, 0]
    sound_files.write_audio(tmp_path / "a.wav", audio)
    np.testing.assert_allclose(sound_files.read_audio(tmp_path / "a.wav"), audio, atol=1e-4)


def test_silence_is_sound(tmp_path):
    sound_files.write_audio(tmp_path / "a.wav", np.zeros(800, np.float32))
    np.testing.assert_array_equal(sound_files.read_audio(tmp_path / "a.wav"), np.zeros(800, np.float32))


@pytest.mark.parametrize("case", ["missing", "text", "empty", "no samples", "picture", "silent video", "nan"])
def test_bad_sound(tmp_path, case):
    path = tmp_path / ("a.mp4" if case == "silent video" else "a.wav")
    if case == "text":
        path.write_text("to be, or not to be\n" * 100)
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "no samples":
        sound_files.write_audio(path, np.zeros(0, np.float32))
    elif case == "picture":
        Image.new("RGB", (32, 32)).save(path, format="PNG")
    elif case == "silent video":
        write_video(path, np.zeros((3, 32, 32, 3), np.uint8))
    elif case == "nan":
        audio = speech_like(0.5, 16000)
        audio[4000] = np.nan
        encode_sound(path, "pcm_f32le", audio, 16000, "mono", "flt")
    with pytest.raises(InputError) as caught:
        sound_files.read_audio(path)
    assert one_line(caught, path)
    expected = {
        "missing": "not found",
        "no samples": "without a single sample",
        "nan": "NaN",
        "silent video": "no sound",
    }
    assert expected.get(case, "") in str(caught.value)


def warnings_of(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# Channels


def test_any_number_of_channels_is_read(tmp_path):
    """PyAV's planes of more than 8 channels lie outside its arrays: reading them ended the process."""
    truth = (0.3 * 2**15 * np.sin(0.2 * np.arange(800))).astype(np.int16)
    for channels in range(1, 65):
        write_wav(tmp_path / "a.wav", np.repeat(truth[:, None], channels, 1))
        np.testing.assert_allclose(sound_files.read_audio(tmp_path / "a.wav"), truth / 2**15, atol=1e-6)
    for channels in (65, 600):
        write_wav(tmp_path / "a.wav", np.repeat(truth[:, None], channels, 1))
        with pytest.raises(InputError) as caught:
            sound_files.read_audio(tmp_path / "a.wav")
        assert one_line(caught, tmp_path / "a.wav")


@pytest.mark.parametrize(
    ("layout", "weights"),
    [
        ("3.0", (0.707, 0.707, 1)),
        ("quad", (0.707, 0.707, 0.5, 0.5)),
        ("5.1", (0.707, 0.707, 1, 0, 0.5, 0.5)),
        ("7.1", (0.707, 0.707, 1, 0, 0.5, 0.5, 0.5, 0.5)),
    ],
)
def test_surround_is_mixed_by_places(tmp_path, layout, weights):
    """The centre keeps its level. Each channel sounds for itself, 100 samples long."""
    audio = np.kron(np.eye(len(weights)), np.full((100, 1), 0.25)).astype(np.float32)
    encode_sound(tmp_path / "a.wav", "pcm_f32le", audio, 16000, layout, "flt")
    read = sound_files.read_audio(tmp_path / "a.wav")
    np.testing.assert_allclose(read, np.repeat(0.25 * np.array(weights), 100), atol=1e-4)
    stereo = sound_files.read_audio(tmp_path / "a.wav", stereo=True)
    assert stereo.shape == (len(audio), 2)
    np.testing.assert_allclose(stereo[:200], audio[:200, :2], atol=1e-6)
    if "FC" in [channel.name for channel in av.AudioLayout(layout).channels]:
        np.testing.assert_allclose(stereo[200:300], 0.25 * np.sqrt(0.5), atol=1e-4)


def test_a_mix_beyond_full_scale_is_scaled_down(tmp_path):
    encode_sound(tmp_path / "a.wav", "pcm_f32le", np.full((800, 6), 0.9, np.float32), 16000, "5.1", "flt")
    np.testing.assert_allclose(sound_files.read_audio(tmp_path / "a.wav"), 1, atol=1e-6)


def test_stereo_is_kept_on_request(tmp_path):
    audio = speech_like(0.3, 16000, 2) * np.float32([1, 0.3])
    encode_sound(tmp_path / "a.wav", "pcm_f32le", audio, 16000, "stereo", "flt")
    np.testing.assert_array_equal(sound_files.read_audio(tmp_path / "a.wav", stereo=True), audio)
    sound_files.write_audio(tmp_path / "mono.wav", audio[:, 0])
    assert sound_files.read_audio(tmp_path / "mono.wav", stereo=True).shape == (4800,)


@pytest.mark.parametrize("residue", [0.0, 0.05])
def test_a_voice_that_cancels_itself_out_is_read_from_one_channel(tmp_path, caplog, residue):
    voice = speech_like(0.5, 16000)
    encode_sound(tmp_path / "a.wav", "pcm_f32le", np.hstack([voice, (residue - 1) * voice]), 16000, "stereo", "flt")
    np.testing.assert_array_equal(sound_files.read_audio(tmp_path / "a.wav"), voice[:, 0])
    (line,) = warnings_of(caplog)
    assert line == f"{tmp_path / 'a.wav'}: its 2 channels cancel each other out; only channel 1 is used"


def test_a_voice_in_one_of_two_channels_is_left_alone(tmp_path, caplog):
    voice = speech_like(0.5, 16000)
    encode_sound(tmp_path / "a.wav", "pcm_f32le", np.hstack([0 * voice, voice]), 16000, "stereo", "flt")
    np.testing.assert_array_equal(sound_files.read_audio(tmp_path / "a.wav"), voice[:, 0] / 2)
    assert not caplog.records


# What is damaged, joined, or tagged in another encoding


def mp3(seconds: float, rate: int = 44100, layout: str = "mono", channels: int = 1) -> bytes:
    file = io.BytesIO()
    audio = speech_like(seconds, rate, channels)
    with av.open(file, "w", format="mp3") as container:
        stream = container.add_stream("libmp3lame", rate=rate)
        stream.layout = layout
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio.T), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    "second", [{}, {"rate": 48000}, {"rate": 22050}, {"layout": "stereo", "channels": 2}], ids=["same", "48", "22", "2"]
)
def test_two_mp3_files_in_one(tmp_path, caplog, second):
    """Rate and layout change midway, and the second file's first packet is no sound."""
    (tmp_path / "a.mp3").write_bytes(mp3(1.0) + mp3(1.0, **second))
    read = sound_files.read_audio(tmp_path / "a.mp3")
    rate = second.get("rate", 44100)
    first, other = (soxr.resample(speech_like(1.0, r)[:, 0], r, 16000) for r in (44100, rate))
    lag, correlation = lag_and_correlation(read[:16000], first)
    assert abs(lag) <= 20  # FFmpeg calls the first millisecond by the second file's rate
    assert correlation > 0.97
    assert len(read) == pytest.approx(2 * 16000, abs=0.12 * 16000)  # MP3's encoders add silence
    lag, correlation = lag_and_correlation(read[17200:29200], other[:12000], 200)
    assert correlation > 0.95
    (line,) = warnings_of(caplog)
    assert line.startswith(f"{tmp_path / 'a.mp3'}: 0.026 s could not be decoded, skipped")


def test_what_cannot_be_decoded_is_skipped_and_its_time_kept(tmp_path, caplog):
    """An MP4's packets have times of their own: behind a damaged one everything is heard when it was."""
    audio = speech_like(2.0, 48000)
    encode_sound(tmp_path / "a.m4a", "aac", audio, 48000, "mono", "fltp")
    whole = sound_files.read_audio(tmp_path / "a.m4a")
    data = bytearray((tmp_path / "a.m4a").read_bytes())
    with av.open(str(tmp_path / "a.m4a")) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux() if packet.size]
    for start, size in packets[40:50]:
        data[start : start + size] = b"\xff" * size
    (tmp_path / "a.m4a").write_bytes(data)
    read = sound_files.read_audio(tmp_path / "a.m4a")
    (line,) = warnings_of(caplog)
    assert line.startswith(f"{tmp_path / 'a.m4a'}: 0.2 s could not be decoded, skipped")
    assert len(read) == len(whole)
    first, behind = round(40 * 1024 / 3), round(51 * 1024 / 3)
    assert np.abs(read[first + 100 : first + 2500]).max() < 1e-3
    assert lag_and_correlation(read[behind:], whole[behind:]) == (0, pytest.approx(1, abs=0.02))


def test_where_nothing_can_be_decoded_the_file_is_refused(tmp_path, caplog):
    encode_sound(tmp_path / "a.m4a", "aac", speech_like(0.5, 48000), 48000, "mono", "fltp")
    data = bytearray((tmp_path / "a.m4a").read_bytes())
    with av.open(str(tmp_path / "a.m4a")) as container:
        for packet in container.demux():
            data[packet.pos or 0 : (packet.pos or 0) + packet.size] = b"\xff" * packet.size
    (tmp_path / "a.m4a").write_bytes(data)
    with pytest.raises(InputError, match="not a sound file that can be read") as caught:
        sound_files.read_audio(tmp_path / "a.m4a")
    assert one_line(caught, tmp_path / "a.m4a")
    assert not caplog.records


@pytest.mark.parametrize("suffix", ["mp3", "m4a"])
def test_tags_may_be_in_any_encoding(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    codec = {"mp3": "libmp3lame", "m4a": "aac"}[suffix]
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "naXve"
        stream = container.add_stream(codec, rate=44100)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 44100, 0, Fraction(1, 44100)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    assert b"naXve" in data
    path.write_bytes(data.replace(b"naXve", b"na\xefve"))
    assert len(sound_files.read_audio(path)) == 16000


# Tracks and times


def write_tracks(path: pathlib.Path, *tracks: tuple[np.ndarray, float], titles: tuple[str, ...] = ()) -> None:
    """A video of 3 s with sound tracks of 48 kHz mono; of each, samples [n 1] and when they start, in seconds."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        streams = []
        for number, _ in enumerate(tracks):
            stream = container.add_stream("aac", rate=48000)
            stream.layout = "mono"
            stream.metadata["title"] = titles[number] if titles else ""
            streams.append(stream)
        for index in range(75):
            frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            frame.pts = index
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        for stream, parts in zip(streams, tracks):
            for samples, start in [parts] if isinstance(parts, tuple) else parts:
                for first in range(0, len(samples), 1024):
                    part = np.ascontiguousarray(samples[first : first + 1024].T)
                    frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
                    frame.sample_rate, frame.time_base = 48000, Fraction(1, 48000)
                    frame.pts = round(start * 48000) + first
                    container.mux(stream.encode(frame))
            container.mux(stream.encode(None))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
def test_sound_that_starts_late_is_silent_before(tmp_path, suffix):
    voice = speech_like(1.5, 48000)
    write_tracks(tmp_path / f"a.{suffix}", (voice, 1.0))
    read = sound_files.read_audio(tmp_path / f"a.{suffix}")
    expected = np.pad(soxr.resample(voice[:, 0], 48000, 16000), (16000, 0))
    lag, correlation = lag_and_correlation(read, expected)
    assert abs(lag) <= 16  # Matroska rounds to milliseconds
    assert correlation > 0.95
    assert np.abs(read[:15500]).max() < 1e-3


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_gap_is_silent(tmp_path, suffix):
    voice = speech_like(1.5, 48000)[: 70 * 1024]
    write_tracks(tmp_path / f"a.{suffix}", [(voice[: 24 * 1024], 0.0), (voice[24 * 1024 :], 24 * 1024 / 48000 + 1.0)])
    read = sound_files.read_audio(tmp_path / f"a.{suffix}")
    heard = soxr.resample(voice[:, 0], 48000, 16000)
    cut = 24 * 1024 // 3
    expected = np.concatenate([heard[:cut], np.zeros(16000, np.float32), heard[cut:]])
    lag, correlation = lag_and_correlation(read, expected)
    assert abs(lag) <= 16
    assert correlation > 0.95  # the encoder blurs the edges
    assert np.abs(read[cut + 1000 : cut + 15000]).max() < 1e-3


def silences(times, *, lost=(), **clock) -> list[float]:
    """Before each of several frames of 1 s."""
    clock = sound_files.Clock(**{"origin": 0.0, "length": 0.0, "timed": True, "spliced": False} | clock)
    found = []
    for i, time in enumerate(times):
        found.append(clock.silence_before(time, float(lost[i]) if lost else 0.0))
        clock.advance(found[-1] + 1.0)
    return found


def test_the_clock_believes_gaps_and_no_jumps():
    assert silences([5.0, 6.0], origin=5.0) == [0, 0]
    assert silences([0.3, 1.3, 3.3, 4.3]) == pytest.approx([0.3, 0, 1, 0])
    assert silences([0.001, 1.002, 1.998, 3.0]) == pytest.approx([0.001, 0, 0, 0])  # times rounded to milliseconds
    assert silences([0.0, 1.02, 2.04, 3.06]) == pytest.approx([0, 0, 0.04, 0])  # packets that were lost one by one
    assert silences([0.0, 1.02, 2.04], lost=[0, 0.02, 0.02]) == pytest.approx([0, 0.02, 0.02])
    assert silences([0.0, 31.0], length=60.0) == [0, 30]
    assert silences([0.0, 31.0, 32.0], length=20.0) == [0, 0, 0]  # a damaged time: the file ends before it
    assert silences([0.0, 31.0, 32.0, 33.5], length=60.0, spliced=True) == [0, 0, 0, 0.5]
    assert silences([0.0, 1.0, 0.0, 1.0, 3.0], spliced=True) == [0, 0, 0, 0, 1]  # a second recording
    assert silences([None, None], lost=[0.5, 0.5]) == [0, 0.5]
    assert silences([7.0, 9.0, 9.0], lost=[0.5, 0.5, 0.0], timed=False) == [0, 0.5, 0]


def test_time_begins_where_the_file_does(tmp_path):
    """MPEG-TS may count from any time."""
    encode_sound(tmp_path / "a.ts", "aac", speech_like(1.0, 48000), 48000, "mono", "fltp", start=5.0)
    with av.open(str(tmp_path / "a.ts")) as container:
        assert container.start_time > 4_900_000
    read = sound_files.read_audio(tmp_path / "a.ts")
    truth = soxr.resample(speech_like(1.0, 48000)[:, 0], 48000, 16000)
    assert len(read) == pytest.approx(16000, abs=700)
    assert lag_and_correlation(read, truth, 400)[1] > 0.95  # AAC's delay of 21 ms is stated nowhere in it


def test_jumping_clocks_of_joined_recordings_are_no_gaps(tmp_path):
    """Two Ogg files put together: the second starts at 0 again."""
    audio = speech_like(1.0, 48000)
    encode_sound(tmp_path / "a.ogg", "libopus", audio, 48000, "mono", "flt")
    single = sound_files.read_audio(tmp_path / "a.ogg")
    (tmp_path / "b.ogg").write_bytes((tmp_path / "a.ogg").read_bytes() * 2)
    read = sound_files.read_audio(tmp_path / "b.ogg")
    assert len(read) == pytest.approx(2 * len(single), abs=0.05 * 16000)
    np.testing.assert_allclose(read[:15000], single[:15000], atol=1e-6)


def test_the_other_tracks_are_named(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="mi_jax")
    voice = speech_like(1.0, 48000)
    write_tracks(tmp_path / "a.mkv", (voice, 0.0), (voice * 0.1, 0.0), titles=("speech", "comments"))
    read = sound_files.read_audio(tmp_path / "a.mkv")
    assert read.std() == pytest.approx(voice.std(), rel=0.05)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage() == (
        f"{tmp_path / 'a.mkv'}: 2 sound tracks; read is 1 (aac, mono, speech), not read: 2 (aac, mono, comments)"
    )


def test_a_silent_track_beside_others_is_a_warning(tmp_path, caplog):
    voice = speech_like(1.0, 48000)
    write_tracks(tmp_path / "a.mp4", (voice * 0, 0.0), (voice, 0.0))
    assert np.abs(sound_files.read_audio(tmp_path / "a.mp4")).max() < 1e-3
    (line,) = warnings_of(caplog)
    assert "2 sound tracks; read is 1 (aac, mono), which is silent, not read: 2 (aac, mono)" in line


# Length


@pytest.mark.parametrize(("rate", "layout", "channels"), [(16000, "mono", 1), (44100, "stereo", 2)])
def test_seconds_are_the_first_of_the_whole(tmp_path, rate, layout, channels):
    encode_sound(tmp_path / "a.flac", "flac", speech_like(2.0, rate, channels), rate, layout, "s16")
    whole = sound_files.read_audio(tmp_path / "a.flac")
    np.testing.assert_array_equal(sound_files.read_audio(tmp_path / "a.flac", seconds=0.7), whole[:11200])
    np.testing.assert_array_equal(sound_files.read_audio(tmp_path / "a.flac", seconds=9.0), whole)


def test_no_more_is_decoded_than_is_asked_for(tmp_path, monkeypatch):
    encode_sound(tmp_path / "a.flac", "flac", speech_like(4.0, 16000), 16000, "mono", "s16")
    frames, real = [], sound_files.decoded
    monkeypatch.setattr(sound_files, "decoded", lambda *args: (frames.append(f) or f for f in real(*args)))
    sound_files.read_audio(tmp_path / "a.flac", seconds=0.5)
    assert sum(frame.samples for frame in frames) < 2 * 16000


def test_a_length_beyond_all_bounds_is_refused_by_the_header(tmp_path, monkeypatch):
    """Ten hours of silence in FLAC are a few megabytes: 2.3 GB in memory."""
    encode_sound(tmp_path / "a.flac", "flac", np.zeros((1600, 1), np.float32), 16000, "mono", "s16")
    data = bytearray((tmp_path / "a.flac").read_bytes())
    position = data.index(b"fLaC") + 8 + 13  # the last 36 bits of 8 bytes in STREAMINFO are the count of samples
    data[position : position + 5] = bytes([data[position] & 0xF0]) + (36000 * 16000).to_bytes(4, "big")
    (tmp_path / "a.flac").write_bytes(data)
    monkeypatch.setattr(sound_files, "decoded", lambda *_: pytest.fail("decoding began"))
    with pytest.raises(InputError, match=r"sound of 10\.0 hours is too long") as caught:
        sound_files.read_audio(tmp_path / "a.flac")
    assert one_line(caught, tmp_path / "a.flac")


def test_a_length_that_no_header_states_is_bounded_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sound_files, "MAX_SECONDS", 1)
    monkeypatch.setattr(sound_files, "_stated_seconds", lambda *_: 0.0)
    sound_files.write_audio(tmp_path / "a.wav", speech_like(2.0, 16000)[:, 0])
    with pytest.raises(InputError, match="too long"):
        sound_files.read_audio(tmp_path / "a.wav")
    assert len(sound_files.read_audio(tmp_path / "a.wav", seconds=1.5)) == 24000


def test_what_memory_cannot_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sound_files, "available_bytes", lambda: 100_000)
    sound_files.write_audio(tmp_path / "a.wav", speech_like(2.0, 16000)[:, 0])
    with pytest.raises(InputError, match="are free") as caught:
        sound_files.read_audio(tmp_path / "a.wav")
    assert one_line(caught, tmp_path / "a.wav")
    assert len(sound_files.read_audio(tmp_path / "a.wav", seconds=1.0)) == 16000


# Long sound lies on the disk


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty temporary folder."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def on_disk(samples: np.ndarray) -> bool:
    return isinstance(samples, np.memmap) and not samples.flags.writeable


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("stereo", [False, True])
def test_long_sound_on_the_disk_is_the_same(tmp_path, folder, monkeypatch, channels, stereo):
    """Also where it is scaled down: six channels go beyond full scale."""
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[channels]
    gains = np.linspace(1, 4, channels, dtype=np.float32)
    audio = speech_like(2.0, 22050, channels) * gains
    encode_sound(tmp_path / "a.wav", "pcm_f32le", audio, 22050, layout, "flt")
    for seconds in (None, 1.5):
        whole = sound_files.read_audio(tmp_path / "a.wav", stereo=stereo, seconds=seconds)
        assert not isinstance(whole, np.memmap)
        with monkeypatch.context() as patch:
            patch.setattr(spool, "IN_MEMORY", 10_000)
            patch.setattr(pieces, "PIECE", 1000)
            read = sound_files.read_audio(tmp_path / "a.wav", stereo=stereo, seconds=seconds)
        assert on_disk(read)
        np.testing.assert_array_equal(read, whole)
        assert list(folder.iterdir()) == []
    if channels == 6:
        assert np.abs(sound_files.read_audio(tmp_path / "a.wav", stereo=stereo)).max() == pytest.approx(1, abs=1e-6)


def test_a_long_voice_that_cancels_itself_out_is_read_from_one_channel(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(spool, "IN_MEMORY", 10_000)
    voice = speech_like(1.0, 16000)
    encode_sound(tmp_path / "a.wav", "pcm_f32le", np.hstack([voice, -voice]), 16000, "stereo", "flt")
    read = sound_files.read_audio(tmp_path / "a.wav")
    assert on_disk(read)
    np.testing.assert_array_equal(read, voice[:, 0])


def test_a_long_sound_that_is_refused_leaves_nothing(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(spool, "IN_MEMORY", 10_000)
    audio = speech_like(1.0, 16000)
    audio[12_000] = np.nan
    encode_sound(tmp_path / "a.wav", "pcm_f32le", audio, 16000, "mono", "flt")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(InputError, match="NaN"):
        sound_files.read_audio(tmp_path / "a.wav")
    assert len(os.listdir("/proc/self/fd")) == before
    assert list(folder.iterdir()) == []


def test_long_sound_takes_no_memory(tmp_path, monkeypatch):
    """Two minutes, 7.7 MB: read, measured, and handed over as samples."""
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        minute = (speech_like(60.0, 16000) * 2**15).astype("<i2").tobytes()
        for _ in range(2):
            file.writeframes(minute)
    monkeypatch.setattr(spool, "IN_MEMORY", 2**18)
    monkeypatch.setattr(pieces, "PIECE", 2**15)
    sound.loudness(np.zeros(100, np.float32))  # librosa's import
    tracemalloc.start()
    try:
        read = sound_files.read_audio(tmp_path / "a.wav")
        _, reading = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        assert sound.remarks(read, "voice 1") == []
        handed = mono(samples_from(read, "voice 1"))
        _, measuring = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read.shape == (2 * 60 * 16000,)
    assert np.shares_memory(handed, read)
    assert reading < 1e6
    assert measuring < 2e6


def test_a_full_temporary_folder_is_one_line(tmp_path, folder, monkeypatch, small_disk):
    monkeypatch.setattr(spool, "IN_MEMORY", 10_000)
    monkeypatch.setattr(sound_files, "_stated_seconds", lambda *_: 0.0)
    write_wav(tmp_path / "a.wav", (speech_like(0.9, 16000) * 2**15).astype(np.int16))
    with pytest.raises(InputError, match="cannot be kept in the temporary folder") as caught:
        sound_files.read_audio(tmp_path / "a.wav")
    assert one_line(caught, tmp_path / "a.wav")
    assert str(folder) in str(caught.value)
    assert list(folder.iterdir()) == []


def test_a_length_for_which_the_temporary_folder_has_no_room_is_refused(tmp_path, folder, monkeypatch):
    """Memory need not hold more than what is kept there."""
    monkeypatch.setattr(spool, "IN_MEMORY", 10_000)
    monkeypatch.setattr(sound_files, "available_bytes", lambda: 20_000)
    sound_files.write_audio(tmp_path / "a.wav", speech_like(2.0, 16000)[:, 0])
    assert len(sound_files.read_audio(tmp_path / "a.wav")) == 32000
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(sound_files.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    monkeypatch.setattr(sound_files, "decoded", lambda *_: pytest.fail("decoding began"))
    with pytest.raises(InputError, match="are free") as caught:
        sound_files.read_audio(tmp_path / "a.wav")
    assert one_line(caught, tmp_path / "a.wav")
    assert str(folder) in str(caught.value)


def test_where_there_is_no_temporary_folder_short_sound_is_read(tmp_path, monkeypatch):
    def none_usable():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none_usable)
    sound_files.write_audio(tmp_path / "a.wav", speech_like(2.0, 16000)[:, 0])
    assert len(sound_files.read_audio(tmp_path / "a.wav")) == 32000
    monkeypatch.setattr(spool, "IN_MEMORY", 10_000)
    with pytest.raises(InputError, match="needs a temporary folder") as caught:
        sound_files.read_audio(tmp_path / "a.wav")
    assert one_line(caught, tmp_path / "a.wav")


def test_pipes_are_told_from_missing_files(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    with pytest.raises(InputError, match="is a pipe or a device, a file is needed"):
        sound_files.read_audio(tmp_path / "a.wav")
