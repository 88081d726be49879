"""Pictures in and out of files, by Pillow.

Every fault of a file is an `InputError` of one line that names the file and what is wrong with it.
"""

import contextlib
import functools
import io
import logging
import pathlib
import struct
import warnings
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageChops, ImageCms, ImageOps

from mi_jax.errors import InputError
from mi_jax.files import PathLike, existing_file, reason, written_beside

MIN_SIDE = 16  # pixels: below this no face can be told from noise
MAX_PIXELS = 80_000_000  # below Pillow's own warning line; a 30,000 x 30,000 picture would need 2.7 GB
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")
DAMAGED = (
    OSError, SyntaxError, ValueError, RuntimeError, LookupError, ArithmeticError, TypeError, AssertionError,
    struct.error,
)  # fmt: skip
"""What Pillow's decoders raise on damaged data, and on pictures that are closed."""
FULL_SCALES = (2**8 - 1, 2**16 - 1, 2**24 - 1, 2**31 - 1, 2**32 - 1)
"""What white may be in a picture of 32-bit whole numbers: the least of these that no pixel goes beyond."""
HIGHLIGHTS = 4.0
"""Times white: how far beyond it the pixels of a floating-point picture may go, to be cut off there."""

log = logging.getLogger("mi_jax")


def read_image(path: PathLike) -> UInt8[np.ndarray, "H W 3"]:
    """A picture file as sRGB, the first of several; see `rgb_from_image`.

    PNG, JPEG, WebP, BMP, GIF, TIFF, PPM, and what Pillow was built for: JPEG 2000, AVIF; HEIC where pillow-heif is
    installed.

    Raises InputError: missing, not a picture, damaged, a side under 16 px, or over 80 million pixels (by its header).
    """
    with _opened_image(path, "picture") as image:
        return rgb_from_image(image, str(path))


def read_mask(path: PathLike) -> Bool[np.ndarray, "H W"]:
    """A mask picture (see `mask_from_image`). Raises as `read_image` does."""
    with _opened_image(path, "mask") as image:
        return mask_from_image(image, str(path))


def mask_from_image(image: Image.Image, name: str = "mask") -> Bool[np.ndarray, "H W"]:
    """True where a PIL image is lighter than mid-grey; transparent counts as black.

    Raises InputError: a picture in which nothing is as light, but something is lighter than black.
    """
    image = ImageOps.exif_transpose(_eight_bits(image, name)).convert("RGBA")
    grey = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image).convert("L")
    return lighter_than_grey(np.array(grey), name)


def lighter_than_grey(grey: UInt8[np.ndarray, "H W"], name: str) -> Bool[np.ndarray, "H W"]:
    """Of a mask in grey. Raises InputError as `mask_from_image` does."""
    if 0 < grey.max() < 128:
        raise InputError(f"{name}: the mask's lightest pixel is {grey.max()} of 255; white, 255, marks the face")
    return grey >= 128


@contextlib.contextmanager
def _opened_image(path: PathLike, what: str) -> Iterator[Image.Image]:
    """An image whose header was found good. Faults in here, and in decoding inside the block, become InputError."""
    path = existing_file(path, what)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks about what is damaged
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_readable_formats()) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise InputError(f"{path}: {what} of {width}x{height} is too large (at most {MAX_PIXELS:,} pixels)")
                if min(width, height) < MIN_SIDE:
                    raise InputError(f"{path}: {what} of {width}x{height} is too small (at least {MIN_SIDE} px a side)")
                yield image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as fault:
        raise InputError(f"{path}: {what} is too large (at most {MAX_PIXELS:,} pixels)") from fault
    except Image.UnidentifiedImageError as fault:
        raise InputError(f"{path}: {what} cannot be read ({_unknown(path)})") from fault
    except InputError:
        raise
    except DAMAGED as fault:
        raise InputError(f"{path}: damaged {what} ({reason(fault)})") from fault


@functools.cache
def _readable_formats() -> tuple[str, ...]:
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def _unknown(path: pathlib.Path) -> str:
    """Why Pillow knows no reader for a file."""
    with open(path, "rb") as file:
        head = file.read(64)
    brands = {head[i : i + 4] for i in range(8, len(head), 4)} if head[4:8] == b"ftyp" else set()
    if brands & {b"avif", b"avis"}:
        return "AVIF, which this Pillow cannot decode: save it as PNG or JPEG"
    if brands & {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}:
        return "HEIC, which needs pillow-heif: pip install pillow-heif, or save it as PNG or JPEG"
    return f"known formats: {', '.join(_readable_formats())}"


def rgb_from_image(image: Image.Image, name: str = "picture") -> UInt8[np.ndarray, "H W 3"]:
    """A PIL image as sRGB pixels, 8 bits: upright by its EXIF rotation, by its colour profile, transparency on white.

    Grey of 16 bits is scaled to 8. In 32-bit whole numbers, white is the least of `FULL_SCALES` that no pixel exceeds.
    In floating point, white is 1, 255 or 65535: the first of which no pixel is more than `HIGHLIGHTS` times. Brighter
    pixels are white, those below 0 black.

    Raises InputError: pixels that are not numbers. `name` is what the picture is called there and in the log.
    """
    image = ImageOps.exif_transpose(_eight_bits(image, name))
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    image = _in_srgb(image, name)
    if alpha is not None:
        image = image.convert("RGB")
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.array(image.convert("RGB"))


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Pixels of 16 and 32 bits, whole or floating, scaled to 8: Pillow's own conversion clips them at 255."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    if image.mode == "F":
        if not np.isfinite(pixels).all():
            raise InputError(f"{name}: holds pixels that are not numbers (NaN or infinite)")
        white = next((white for white in (1, 255) if pixels.max() <= HIGHLIGHTS * white), 65535)
    elif image.mode == "I":
        signed = getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT, (1,))[0] == 2
        if getattr(image, "format", None) == "TIFF" and not signed:
            pixels = pixels.astype(np.uint32)  # Pillow reads them as if they had a sign
        white = next(white for white in FULL_SCALES if pixels.max() <= white)
    else:
        white = 65535
    scaled = Image.fromarray((pixels.astype(np.float64) * (255 / white)).round().clip(0, 255).astype(np.uint8))
    scaled.info = dict(image.info)  # its colour profile, and how it is turned
    return scaled


_SAMPLE_FORMAT = 339  # a TIFF tag


def _in_srgb(image: Image.Image, name: str) -> Image.Image:
    """The colours that the embedded profile means, without transparency; the image itself where it has none."""
    stored = image.info.get("icc_profile")
    if not stored and image.mode != "LAB":
        return image
    try:
        source = ImageCms.createProfile("LAB") if image.mode == "LAB" else io.BytesIO(stored)
        profile = ImageCms.ImageCmsProfile(source)
        mode = {"RGB": "RGB", "GRAY": "L"}.get(profile.profile.xcolor_space.strip(), image.mode)
        converted = ImageCms.profileToProfile(
            image.convert(mode),
            profile,
            ImageCms.createProfile("sRGB"),
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImportError, OSError, ImageCms.PyCMSError) as fault:
        log.warning("%s: colour profile not applied (%s)", name, reason(fault))
        return image
    if mode == "RGB":  # an sRGB picture stays as it is, to the bit: its colours move by rounding alone
        plain = image.convert("RGB")
        if max(high for _, high in ImageChops.difference(plain, converted).getextrema()) <= 1:
            return plain
    return converted


def fit_image(image: UInt8[np.ndarray, "H W 3"], height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
    """The centre of `image`, as large as the new aspect allows, resampled (Lanczos) to height x width."""
    fitted = ImageOps.fit(Image.fromarray(image), (width, height), Image.Resampling.LANCZOS)
    return np.array(fitted)


def fit_mask(mask: Bool[np.ndarray, "H W"], height: int, width: int) -> Bool[np.ndarray, "h w"]:
    """What `fit_image` keeps of a mask of the picture's size: areas are averaged, one half and more is True."""
    fitted = ImageOps.fit(Image.fromarray(mask.astype(np.uint8) * 255), (width, height), Image.Resampling.BOX)
    return np.array(fitted) >= 128


def write_image(path: PathLike, image: UInt8[np.ndarray, "H W ..."]) -> None:
    """Writes a picture (grey or RGB; the suffix names the format). Raises InputError where it cannot be written."""
    with written_beside(path) as partial:
        Image.fromarray(image).save(partial)
