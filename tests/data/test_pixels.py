"""Pictures, masks and videos in memory: what can be meant is understood the same way, the rest is one line."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mi_jax.data.pixels import frames_from, mask_from, pixels_from
from mi_jax.errors import InputError

RGB = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
GREY = RGB[:, :, 0]
MASK = GREY > 127

PICTURES = {
    "PIL": Image.fromarray(RGB),
    "jax": jnp.asarray(RGB),
    "float": RGB / 255,
    "float32 with the rounding of a resize": (RGB / np.float32(255)) * np.float32(1.0005),
    "jax float": jnp.asarray(RGB / np.float32(255)),
    "channels first": RGB.transpose(2, 0, 1),
    "a batch of one": RGB[None],
    "a list": RGB.tolist(),
    "int64": RGB.astype(np.int64),
    "uint16": RGB.astype(np.uint16) * 257,
    "uint16 of the other byte order": (RGB.astype(np.uint16) * 257).astype(">u2"),
    "uint16 of bytes": RGB.astype(np.uint16),
    "opaque RGBA": np.concatenate([RGB, np.full((20, 24, 1), 255, np.uint8)], axis=2),
    "not contiguous": np.asfortranarray(RGB),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_every_kind_of_picture_is_the_same(kind):
    pixels = pixels_from(PICTURES[kind], "portrait")
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, RGB)


def test_halves_round_and_grey_is_three_times_itself():
    half = jnp.asarray(RGB / np.float32(255), jnp.bfloat16)
    assert np.abs(pixels_from(half, "portrait").astype(int) - RGB).max() <= 1
    for grey in (GREY, GREY[:, :, None], Image.fromarray(GREY)):
        np.testing.assert_array_equal(pixels_from(grey, "portrait"), np.stack([GREY] * 3, -1))
    clear = np.concatenate([RGB, np.zeros((20, 24, 1), np.uint8)], axis=2)
    assert (pixels_from(clear, "portrait") == 255).all()  # nothing, on white


def test_torch_is_understood():
    torch = pytest.importorskip("torch")
    channels_first = torch.from_numpy(RGB).permute(2, 0, 1)
    np.testing.assert_array_equal(pixels_from(channels_first, "portrait"), RGB)
    np.testing.assert_array_equal(pixels_from((channels_first / 255).requires_grad_(), "portrait"), RGB)
    np.testing.assert_array_equal(mask_from(torch.from_numpy(MASK), "mask 1"), MASK)
    frames = [torch.from_numpy(RGB), torch.from_numpy(RGB)]
    np.testing.assert_array_equal(frames_from(frames, "video"), np.stack([RGB, RGB]))


def closed_picture() -> Image.Image:
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, "png")
    with Image.open(file) as image:
        return image


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (None, "portrait: None cannot be meant: give a picture file"),
        (b"\x89PNG", "portrait: bytes cannot be meant"),
        (object(), "portrait: object cannot be meant"),
        ({"path": "a.png"}, "portrait: dict cannot be meant"),
        ([[1, 2], [3]], "portrait: list cannot be meant"),
        (RGB / 127.5 - 1, "portrait: pixels reach from -1 to 1: give"),
        (RGB.astype(np.float32), "portrait: pixels reach from 0 to 255: give"),
        (RGB.astype(int) * 2, "portrait: pixels reach from 0 to 510: give"),
        (np.where(RGB > 3, RGB / 255, np.nan), "portrait: holds pixels that are not numbers"),
        (RGB > 7, "portrait: pixels of bool cannot be meant"),
        (RGB.astype(complex), "portrait: pixels of complex128 cannot be meant"),
        (RGB[None, :1], "portrait: 24x1 is too small"),
        (RGB[:2], "portrait: 24x2 is too small"),
        (np.stack([RGB, RGB]), "portrait: [2, 20, 24, 3] cannot be meant"),
        (jnp.ones((20, 24), jnp.int4), "portrait: pixels of int4 cannot be meant"),
        (closed_picture(), "portrait: cannot be read ("),
        (RGB[:, :0], "portrait: [20, 0, 3] cannot be meant"),
        (np.zeros((20, 24, 7)), "portrait: [20, 24, 7] cannot be meant"),
        (np.broadcast_to(np.uint8(0), (10_000, 10_000, 3)), "portrait: 10000x10000 is too large"),
    ],
)
def test_what_is_no_picture_is_said(picture, said):
    with pytest.raises(InputError) as fault:
        pixels_from(picture, "portrait")
    assert str(fault.value).startswith(said)
    assert "\n" not in str(fault.value)


MASKS = {
    "bool": MASK,
    "jax": jnp.asarray(MASK),
    "0 and 1": MASK.astype(np.uint8),
    "0 and 255": MASK.astype(np.uint8) * 255,
    "int64": MASK.astype(np.int64) * 255,
    "float": MASK.astype(np.float64),
    "soft": MASK * 0.4 + 0.3,
    "grey": GREY,
    "RGB": np.stack([GREY] * 3, -1),
    "one channel": MASK[:, :, None],
    "channels first": MASK[None],
    "uint16": MASK.astype(np.uint16) * 255,
    "RGBA, opaque": np.stack([GREY] * 3 + [np.full_like(GREY, 255)], -1),
    "RGBA, transparent where nothing is marked": np.stack([MASK.astype(np.uint8) * 255] * 4, -1),
    "a list": MASK.tolist(),
    "PIL": Image.fromarray(GREY),
    "PIL of two colours": Image.fromarray(MASK),
}


@pytest.mark.parametrize("kind", MASKS)
def test_every_kind_of_mask_is_the_same(kind):
    mask = mask_from(MASKS[kind], "mask 1")
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, MASK)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (np.zeros((20, 24), bool), "mask 1: mask is empty"),
        (np.zeros((0, 0), bool), "mask 1: mask is empty"),
        (np.full((20, 24), 0.2), "mask 1: mask is empty"),
        (np.full((20, 24), 3, np.uint8), "mask 1: the mask's lightest pixel is 3 of 255"),
        (Image.new("L", (24, 20), 9), "mask 1: the mask's lightest pixel is 9 of 255"),
        (RGB, "mask 1: a mask is [H W], this is [20, 24, 3], of channels that differ"),
        (np.full((20, 24), 255.0), "mask 1: pixels reach from 255 to 255"),
        (np.full((20, 24), np.nan), "mask 1: holds pixels that are not numbers"),
        (MASK[0], "mask 1: [24] cannot be meant"),
        ("face", "mask 1: str cannot be meant"),
    ],
)
def test_what_is_no_mask_is_said(mask, said):
    with pytest.raises(InputError) as fault:
        mask_from(mask, "mask 1")
    assert str(fault.value).startswith(said)


def test_every_kind_of_video_is_the_same():
    video = np.stack([RGB, RGB[::-1]])
    for kind in (video, jnp.asarray(video), video / 255, list(video), [Image.fromarray(frame) for frame in video]):
        np.testing.assert_array_equal(frames_from(kind, "video"), video)
    for wrong in (RGB, video[:0], video[..., :1], video.astype(float), None, "video.mp4", [RGB, RGB[:5]]):
        with pytest.raises(InputError, match=r"^video: .*give an array \[f H W 3\]"):
            frames_from(wrong, "video")
