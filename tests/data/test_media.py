"""Media in and out: exact where the format is lossless, close where it is not, one clear line where the file is bad."""

import pathlib
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
import soxr
from PIL import Image

from mi_jax.data import media
from mi_jax.errors import InputError


def speech_like(seconds: float, rate: int, channels: int = 1) -> np.ndarray:
    """Noise through a one-pole low-pass, [n c] float32: broadband enough to show any shift in time."""
    samples = np.random.default_rng(0).normal(size=round(seconds * rate))
    smooth = np.convolve(samples, 0.9 ** np.arange(60), mode="same")
    return np.repeat((0.2 * smooth / np.abs(smooth).max())[:, None], channels, 1).astype(np.float32)


def encode_sound(path: pathlib.Path, codec: str, audio: np.ndarray, rate: int, layout: str, sample_format: str) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = layout
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio.T), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for part in av.AudioResampler(format=sample_format).resample(frame):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))


def one_line(caught: pytest.ExceptionInfo, path: pathlib.Path) -> bool:
    """An error message of one line that names the file."""
    return "\n" not in str(caught.value) and str(path) in str(caught.value)


# Pictures


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp"])
def test_lossless_pictures_are_exact(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", lossless=True)
    np.testing.assert_array_equal(media.read_image(tmp_path / f"a.{suffix}"), pixels)


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [
        (1, lambda x: x),
        (2, lambda x: x[:, ::-1]),
        (3, lambda x: x[::-1, ::-1]),
        (6, lambda x: np.rot90(x, -1)),
        (8, lambda x: np.rot90(x)),
    ],
)
def test_exif_rotation_is_applied(tmp_path, orientation, undo):
    stored = np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(media.read_image(tmp_path / "a.png"), undo(stored))


def test_transparency_is_composited_on_white(tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., 0], pixels[:8, :, 3], pixels[8:, :, 3] = 100, 0, 51  # 51 / 255 = one fifth
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    read = media.read_image(tmp_path / "a.png")
    assert (read[:8] == 255).all()
    assert (read[8:] == [round(0.8 * 255 + 0.2 * 100), 204, 204]).all()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "I;16"])
def test_every_colour_mode_keeps_its_grey(tmp_path, mode):
    grey = np.zeros((16, 16), np.uint8)
    grey[4:] = 255
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
        assert image.mode == "I;16"
    else:
        image = Image.fromarray(np.stack([grey] * 3, -1)).convert(mode)
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    image.save(path)
    np.testing.assert_array_equal(media.read_image(path), np.stack([grey] * 3, -1))


def test_fit_image_is_a_centred_crop_then_a_resize():
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 22:74] = 200  # the central square and the reach of the filter around it
    assert (media.fit_image(wide, 16, 16) == 200).all()
    np.testing.assert_array_equal(media.fit_image(wide, 32, 96), wide)
    tall = np.swapaxes(wide, 0, 1)
    assert (media.fit_image(tall, 16, 16) == 200).all()
    mask = wide[..., 0] > 0
    np.testing.assert_array_equal(media.fit_mask(mask, 16, 16), np.ones((16, 16), bool))
    np.testing.assert_array_equal(media.fit_mask(mask, 32, 96), mask)


def test_mask_is_light_and_opaque(tmp_path):
    mask = np.zeros((16, 16), bool)
    mask[2:5, 7:9] = True
    media.write_image(tmp_path / "grey.png", mask.astype(np.uint8) * 255)
    rgba = np.full((16, 16, 4), 255, np.uint8)
    rgba[..., 3] = mask * 255
    Image.fromarray(rgba, "RGBA").save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(media.read_mask(tmp_path / "grey.png"), mask)
    np.testing.assert_array_equal(media.read_mask(tmp_path / "alpha.png"), mask)


def huge_png(path: pathlib.Path, side: int) -> None:
    """A PNG whose header claims side x side; its pixels are never there, so it can only be refused by its header."""
    Image.new("L", (20, 20)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("case", ["missing", "folder", "text", "empty", "truncated", "1x1", "9500", "30000"])
def test_bad_pictures(tmp_path, case):
    path = tmp_path / "a.png"
    if case == "folder":
        path.mkdir()
    elif case == "text":
        path.write_text("hello")
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:4000])
    elif case == "1x1":
        Image.new("RGB", (1, 1)).save(path)
    elif case != "missing":
        huge_png(path, int(case))
    with pytest.raises(InputError) as caught:
        media.read_image(path)
    assert one_line(caught, path)
    expected = {"missing": "not found", "1x1": "too small", "30000": "too large", "9500": "too large"}
    assert expected.get(case, "") in str(caught.value)


# Sound


@pytest.mark.parametrize(
    ("suffix", "codec", "rate", "layout", "sample_format"),
    [
        ("wav", "pcm_s16le", 16000, "mono", "s16"),
        ("wav", "pcm_u8", 8000, "mono", "u8"),
        ("wav", "pcm_f32le", 44100, "stereo", "flt"),
        ("wav", "pcm_s24le", 48000, "5.1", "s32"),
        ("flac", "flac", 22050, "stereo", "s16"),
        ("mp3", "libmp3lame", 44100, "stereo", "fltp"),
        ("m4a", "aac", 48000, "mono", "fltp"),
        ("ogg", "libopus", 48000, "mono", "flt"),
    ],
)
def test_sound_of_any_rate_and_layout_keeps_level_and_time(tmp_path, suffix, codec, rate, layout, sample_format):
    path = tmp_path / f"a.{suffix}"
    channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
    truth = speech_like(1.5, rate, channels)
    encode_sound(path, codec, truth, rate, layout, sample_format)
    read = media.read_audio(path)
    assert len(read) == 24000
    expected = soxr.resample(truth[:, 0], rate, 16000)
    n = min(len(read), len(expected))
    lags = {lag: np.corrcoef(read[200 + lag : n - 200 + lag], expected[200 : n - 200])[0, 1] for lag in range(-40, 41)}
    assert max(lags, key=lags.get) == 0
    assert lags[0] > 0.97
    assert np.std(read[:n]) == pytest.approx(np.std(expected[:n]), rel=0.05)


def test_channels_are_averaged(tmp_path):
    stereo = np.stack([np.full(1600, 0.5), np.full(1600, -0.1)], -1).astype(np.float32)
    encode_sound(tmp_path / "a.wav", "pcm_f32le", stereo, 16000, "stereo", "flt")
    np.testing.assert_allclose(media.read_audio(tmp_path / "a.wav"), 0.2, atol=1e-6)


def test_written_sound_is_read_back(tmp_path):
    audio = speech_like(0.5, 16000)[:, 0]
    media.write_audio(tmp_path / "a.wav", audio)
    np.testing.assert_allclose(media.read_audio(tmp_path / "a.wav"), audio, atol=1e-4)


def test_silence_is_sound(tmp_path):
    media.write_audio(tmp_path / "a.wav", np.zeros(800, np.float32))
    np.testing.assert_array_equal(media.read_audio(tmp_path / "a.wav"), np.zeros(800, np.float32))


@pytest.mark.parametrize("case", ["missing", "text", "empty", "no samples", "picture", "silent video", "nan"])
def test_bad_sound(tmp_path, case):
    path = tmp_path / ("a.mp4" if case == "silent video" else "a.wav")
    if case == "text":
        path.write_text("to be, or not to be\n" * 100)
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "no samples":
        media.write_audio(path, np.zeros(0, np.float32))
    elif case == "picture":
        Image.new("RGB", (32, 32)).save(path, format="PNG")
    elif case == "silent video":
        media.write_video(path, np.zeros((3, 32, 32, 3), np.uint8))
    elif case == "nan":
        audio = speech_like(0.5, 16000)
        audio[4000] = np.nan
        encode_sound(path, "pcm_f32le", audio, 16000, "mono", "flt")
    with pytest.raises(InputError) as caught:
        media.read_audio(path)
    assert one_line(caught, path)
    expected = {
        "missing": "not found",
        "no samples": "without a single sample",
        "nan": "NaN",
        "silent video": "no sound",
    }
    assert expected.get(case, "") in str(caught.value)


# Video


def moving_square(frames: int, height: int, width: int) -> np.ndarray:
    video = np.full((frames, height, width, 3), (30, 60, 220), np.uint8)
    for index, frame in enumerate(video):
        frame[8:24, index : index + 16] = (200, 50, 30)
    return video


@pytest.mark.parametrize("size", [(48, 64), (47, 63)])
def test_video_round_trip_keeps_frames_colours_and_sound(tmp_path, size):
    video = moving_square(30, *size)
    audio = speech_like(1.2, 16000)[:, 0]
    media.write_video(tmp_path / "a.mp4", iter(video), audio)
    read, rate = media.read_video(tmp_path / "a.mp4")
    assert rate == 25
    assert read.shape == (30, 48, 64, 3)  # odd sides grow by one
    assert np.abs(read[:, : size[0], : size[1]].astype(int) - video).mean() < 3  # colour is at half the resolution
    assert np.abs(read[:, 40, 60].astype(int) - (30, 60, 220)).max() <= 3
    sound = media.read_audio(tmp_path / "a.mp4")
    assert np.corrcoef(sound[: len(audio)], audio)[0, 1] > 0.99
    assert len(sound) == len(audio)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_stereo_sound_is_written_per_channel(tmp_path):
    stereo = np.stack([speech_like(1, 16000)[:, 0], np.zeros(16000, np.float32)], -1)
    media.write_video(tmp_path / "a.mov", moving_square(25, 32, 48), stereo)
    with av.open(str(tmp_path / "a.mov")) as container:
        assert container.streams.audio[0].channels == 2
    np.testing.assert_allclose(media.read_audio(tmp_path / "a.mov")[:16000].std(), stereo[:, 0].std() / 2, rtol=0.05)


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
        media.write_video(path, moving_square(2, 32, 32))
    assert one_line(caught, path)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_error_midway_leaves_the_old_file(tmp_path):
    media.write_video(tmp_path / "a.mp4", moving_square(3, 32, 32))
    before = (tmp_path / "a.mp4").read_bytes()

    def frames():
        yield from moving_square(3, 32, 32)
        raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError, match="the model failed"):
        media.write_video(tmp_path / "a.mp4", frames())
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == before


def test_sound_that_is_not_finite_is_refused_before_writing(tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        media.write_video(tmp_path / "a.mp4", moving_square(3, 32, 32), np.full(10, np.nan, np.float32))
    assert list(tmp_path.iterdir()) == []
