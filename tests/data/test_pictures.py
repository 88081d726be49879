"""Pictures: exact where the format is lossless, the colours that are meant, one clear line where the file is bad."""

import contextlib
import io
import logging
import pathlib
import struct
import sys
import types
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from tiny_media import one_line

from mi_jax.data import pictures
from mi_jax.errors import InputError


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp"])
def test_lossless_pictures_are_exact(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", lossless=True)
    np.testing.assert_array_equal(pictures.read_image(tmp_path / f"a.{suffix}"), pixels)


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
    np.testing.assert_array_equal(pictures.read_image(tmp_path / "a.png"), undo(stored))


def test_transparency_is_composited_on_white(tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., 0], pixels[:8, :, 3], pixels[8:, :, 3] = 100, 0, 51  # 51 / 255 = one fifth
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    read = pictures.read_image(tmp_path / "a.png")
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
    np.testing.assert_array_equal(pictures.read_image(path), np.stack([grey] * 3, -1))


def test_fit_image_is_a_centred_crop_then_a_resize():
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 22:74] = 200  # the central square and the reach of the filter around it
    assert (pictures.fit_image(wide, 16, 16) == 200).all()
    np.testing.assert_array_equal(pictures.fit_image(wide, 32, 96), wide)
    tall = np.swapaxes(wide, 0, 1)
    assert (pictures.fit_image(tall, 16, 16) == 200).all()
    mask = wide[..., 0] > 0
    np.testing.assert_array_equal(pictures.fit_mask(mask, 16, 16), np.ones((16, 16), bool))
    np.testing.assert_array_equal(pictures.fit_mask(mask, 32, 96), mask)


def test_mask_is_light_and_opaque(tmp_path):
    mask = np.zeros((16, 16), bool)
    mask[2:5, 7:9] = True
    pictures.write_image(tmp_path / "grey.png", mask.astype(np.uint8) * 255)
    rgba = np.full((16, 16, 4), 255, np.uint8)
    rgba[..., 3] = mask * 255
    Image.fromarray(rgba, "RGBA").save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(pictures.read_mask(tmp_path / "grey.png"), mask)
    np.testing.assert_array_equal(pictures.read_mask(tmp_path / "alpha.png"), mask)


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
        pictures.read_image(path)
    assert one_line(caught, path)
    expected = {"missing": "not found", "1x1": "too small", "30000": "too large", "9500": "too large"}
    assert expected.get(case, "") in str(caught.value)


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    "pixels",
    [
        GREY.astype(np.float32) / 255,
        GREY.astype(np.float32),
        GREY.astype(np.float32) * 257,
        np.where(GREY == 255, 3.0, GREY / 255).astype(np.float32),  # a highlight of three times white
        np.where(GREY == 0, -0.5, GREY / 255).astype(np.float32),
        GREY.astype(np.int32),
        GREY.astype(np.int32) * 257,
        GREY.astype(np.int32) * 65793,
        (GREY * ((2**31 - 1) / 255)).astype(np.int32),
        np.where(GREY == 0, -(2**30), GREY.astype(np.int64)).astype(np.int32),
    ],
)
def test_pictures_of_32_bits_are_scaled_to_8(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    read = pictures.read_image(tmp_path / "a.tif")
    np.testing.assert_array_equal(read, np.stack([GREY] * 3, -1))
    np.testing.assert_array_equal(pictures.read_mask(tmp_path / "a.tif"), GREY >= 128)


def test_whole_numbers_without_a_sign_go_to_two_to_the_32(tmp_path):
    numbers = (GREY.astype(np.float64) * ((2**32 - 1) / 255)).astype(np.uint32)
    Image.fromarray(numbers.view(np.int32)).save(tmp_path / "a.tif")
    data = (tmp_path / "a.tif").read_bytes()
    signed, unsigned = (struct.pack("<HHIHH", 339, 3, 1, kind, 0) for kind in (2, 1))  # the tag SampleFormat
    assert data.count(signed) == 1
    (tmp_path / "a.tif").write_bytes(data.replace(signed, unsigned))
    np.testing.assert_array_equal(pictures.read_image(tmp_path / "a.tif"), np.stack([GREY] * 3, -1))


@pytest.mark.parametrize(
    ("name", "pixels"), [("a.tif", GREY.astype(np.float32)), ("a.png", GREY.astype(np.uint16) * 257)]
)
def test_a_picture_of_many_bits_is_turned_upright(tmp_path, name, pixels):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    np.testing.assert_array_equal(pictures.read_image(tmp_path / name)[..., 0], np.rot90(GREY, -1))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_no_numbers_are_refused(tmp_path, value):
    Image.fromarray(np.full((16, 16), value, np.float32)).save(tmp_path / "a.tif")
    for read in (pictures.read_image, pictures.read_mask):
        with pytest.raises(InputError, match="not numbers") as caught:
            read(tmp_path / "a.tif")
        assert one_line(caught, tmp_path / "a.tif")


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# Columns: X, Y, Z (of D50) of red, green and blue; Display P3's as Apple publishes them.
DISPLAY_P3 = np.array([[0.515121, 0.291977, 0.157104], [0.241196, 0.692245, 0.066574], [-0.001053, 0.041885, 0.784073]])


def profile_of(primaries: np.ndarray) -> bytes:
    """An sRGB profile with other primaries: the three tags that hold them are overwritten."""
    data = bytearray(SRGB)
    for i in range(int.from_bytes(data[128:132], "big")):
        name, offset, _ = struct.unpack(">4sII", data[132 + 12 * i : 144 + 12 * i])
        if name in (b"rXYZ", b"gXYZ", b"bXYZ"):
            column = primaries[:, b"rgb".index(name[:1])]
            data[offset + 8 : offset + 20] = struct.pack(">3i", *(round(x * 65536) for x in column))
    return bytes(data)


def srgb_primaries() -> np.ndarray:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).profile
    return np.stack([profile.red_colorant[0], profile.green_colorant[0], profile.blue_colorant[0]], -1)


def linear(pixels: np.ndarray) -> np.ndarray:
    x = pixels / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def encoded(light: np.ndarray) -> np.ndarray:
    return 255 * np.where(light <= 0.0031308, light * 12.92, 1.055 * np.maximum(light, 0) ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colour_profiles_are_applied(tmp_path, mode):
    """The closed form: linear light, from one set of primaries to the other."""
    stored = np.random.default_rng(0).integers(90, 160, (20, 31, 3), np.uint8)  # inside both gamuts
    expected = encoded(linear(stored) @ (np.linalg.inv(srgb_primaries()) @ DISPLAY_P3).T)
    Image.fromarray(stored).convert(mode).save(tmp_path / "a.png", icc_profile=profile_of(DISPLAY_P3))
    read = pictures.read_image(tmp_path / "a.png")
    assert np.abs(expected - stored).mean() > 3
    assert np.abs(read - expected).max() < 1.5


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "I;16"])
def test_a_profile_that_changes_nothing_costs_no_bit(tmp_path, mode):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([grey] * 3, -1))
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    plain = np.asarray(image.convert("RGB")) if mode == "P" else np.stack([grey] * 3, -1)
    image.save(tmp_path / "a.png", icc_profile=SRGB)
    np.testing.assert_array_equal(pictures.read_image(tmp_path / "a.png"), plain)


def test_rounding_alone_moves_no_colour(tmp_path):
    """Profiles of sRGB differ in the last digits of their numbers: conversion changes some pixels by 1."""
    stored = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    other = profile_of(srgb_primaries() * (1 + 5e-3 * np.array([1, -1, 1])))
    converted = ImageCms.profileToProfile(
        Image.fromarray(stored), ImageCms.ImageCmsProfile(io.BytesIO(other)), ImageCms.createProfile("sRGB")
    )
    assert np.abs(np.asarray(converted).astype(int) - stored).max() == 1
    Image.fromarray(stored).save(tmp_path / "a.png", icc_profile=other)
    np.testing.assert_array_equal(pictures.read_image(tmp_path / "a.png"), stored)


def test_transparency_is_kept_under_a_profile(tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[8:, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile_of(DISPLAY_P3))
    read = pictures.read_image(tmp_path / "a.png")
    assert (read[:8] == 255).all()
    assert (read[8:] == 0).all()


def test_a_broken_profile_is_said_and_left(tmp_path, caplog):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=b"no profile" * 20)
    np.testing.assert_array_equal(pictures.read_image(tmp_path / "a.png"), pixels)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{tmp_path / 'a.png'}: colour profile not applied" in record.getMessage()


@pytest.mark.parametrize(
    ("suffix", "options", "error"),
    [("ppm", {}, 0), ("jp2", {"irreversible": False}, 0), ("avif", {"quality": 95, "subsampling": "4:4:4"}, 2)],
)
def test_other_formats_are_read_where_pillow_can(tmp_path, suffix, options, error):
    smooth = np.stack(np.broadcast_arrays(np.arange(32)[:, None] * 7, np.arange(48) * 5, 90), -1).astype(np.uint8)
    try:
        Image.fromarray(smooth).save(tmp_path / f"a.{suffix}", **options)
    except (KeyError, ValueError, OSError):
        pytest.skip("this Pillow cannot write it")
    read = pictures.read_image(tmp_path / f"a.{suffix}")
    assert np.abs(read.astype(int) - smooth).mean() <= error


@pytest.fixture
def formats():
    """Readers are looked for anew, before and after."""
    pictures._readable_formats.cache_clear()
    yield
    pictures._readable_formats.cache_clear()


@pytest.mark.parametrize(("brand", "message"), [(b"heic", "pip install pillow-heif"), (b"avif", "AVIF")])
def test_formats_without_a_reader_are_named(tmp_path, monkeypatch, formats, brand, message):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for name in ("AVIF", "HEIF"):
        monkeypatch.delitem(Image.OPEN, name, raising=False)
    monkeypatch.setattr(Image, "init", lambda: True)
    path = tmp_path / "a.png"
    path.write_bytes(b"\x00\x00\x00\x18ftyp" + brand + b"\x00\x00\x00\x00mif1" + brand + b"\x00" * 100)
    with pytest.raises(InputError, match=message) as caught:
        pictures.read_image(path)
    assert one_line(caught, path)


def test_heic_is_read_where_its_reader_is_installed(tmp_path, monkeypatch, formats):
    """`register_heif_opener` adds Pillow's reader "HEIF"; here a stand-in that finds a PNG behind the brand."""

    def opener(file, name):
        with file:
            return Image.open(io.BytesIO(file.read()[12:]), formats=["PNG"])

    def register_heif_opener():
        monkeypatch.setitem(Image.OPEN, "HEIF", (opener, lambda head: head[4:12] == b"ftypheic"))

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register_heif_opener))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 31, 3), np.uint8)
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "png")
    (tmp_path / "a.heic").write_bytes(b"\x00\x00\x00\x18ftypheic" + png.getvalue())
    np.testing.assert_array_equal(pictures.read_image(tmp_path / "a.heic"), pixels)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "jp2", "avif", "ppm", "gif", "webp", "bmp"])
def test_damaged_pictures_are_read_or_refused(tmp_path, suffix):
    """Whatever a decoder raises: 20 files of each kind with 8 bytes of noise in their first 400."""
    rng = np.random.default_rng(0)
    path = tmp_path / f"a.{suffix}"
    try:
        Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8)).save(path)
    except (KeyError, ValueError, OSError):
        pytest.skip("this Pillow cannot write it")
    whole = path.read_bytes()
    for _ in range(20):
        data = bytearray(whole)
        for place in rng.integers(0, min(400, len(data)), 8):
            data[place] = rng.integers(256)
        path.write_bytes(data)
        with contextlib.suppress(InputError):
            assert pictures.read_image(path).dtype == np.uint8
