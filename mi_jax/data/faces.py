"""Which region of the portrait each voice moves: masks given by hand, else found faces, else the whole picture."""

import contextlib
import importlib.util
import numbers
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from mi_jax.data import pictures
from mi_jax.data.detector import DetectorUnavailable, find_detector
from mi_jax.data.pixels import mask_from
from mi_jax.errors import InputError
from mi_jax.files import PathLike, reason

FACE_GROWTH = 1.7
"""A detected box spans brows to chin; the region that talks and turns is about three times that area, as in
HunyuanVideo-Avatar."""
MIN_CONFIDENCE = 0.75
"""Faces of photographs score above 0.9; fur, cups and galaxies reach 0.65, an emblem on a space suit 0.74."""
DETECTION_SIDE = 1024  # px: the detector works at 128, so more is only cost

MaskSource = Any
"""A file, or what `pixels.mask_from` takes."""


def face_masks(
    portrait: UInt8[np.ndarray, "H W 3"],
    speakers: int,
    masks: Sequence[MaskSource | None] | None = None,
    model_path: PathLike | None = None,
) -> tuple[Bool[np.ndarray, "s H W"], str]:
    """One mask per speaker at the size of `portrait`, and a sentence that says where they came from.

    Given masks (one per speaker, of another size: resized) come first. Else the faces that MediaPipe finds, largest
    first, ordered left to right like the speakers. Else, for a single speaker, the whole picture.

    Args:
      model_path: a detector model of MediaPipe's Face Detector task; by default as `detector.find_detector` says.

    Raises:
      InputError: a mask that is missing, unreadable or empty, or masks for some speakers only; no mask and fewer faces
        found than there are speakers.
    """
    given = [] if masks is None else list(masks)
    if any(mask is not None for mask in given):
        if len(given) != speakers or any(mask is None for mask in given):
            count = sum(mask is not None for mask in given)
            raise InputError(
                f"{count} masks for {speakers} speakers: give one mask (--mask) for every speaker, or none"
            )
        return _given_masks(portrait, given)
    try:
        boxes = detect_faces(portrait, model_path)
        found = f"{len(boxes)} face{'s' * (len(boxes) != 1)} found by MediaPipe"
    except DetectorUnavailable as reason:
        boxes, found = np.zeros((0, 4)), str(reason)
    if len(boxes) >= speakers:
        which = "" if len(boxes) == speakers else f", the largest {speakers} used"
        order = ", from left to right" if speakers > 1 else ""
        return masks_from_boxes(boxes[:speakers], portrait.shape[:2]), f"face mask: {found}{which}{order}"
    if speakers > 1:
        raise InputError(
            f"{speakers} voices, but {found}: give one face mask per voice (--mask; in Python Speaker(mask=))"
        )
    return np.ones((1, *portrait.shape[:2]), bool), f"face mask: the whole picture ({found})"


def _given_masks(portrait: np.ndarray, given: Sequence[MaskSource]) -> tuple[np.ndarray, str]:
    height, width = portrait.shape[:2]
    masks, names, notes = [], [], []
    for number, source in enumerate(given, 1):
        is_file = isinstance(source, PathLike)
        name = str(source) if is_file else f"mask {number}"
        if is_box(source):
            mask = mask_of_box(source, name, height, width)
        else:
            mask = pictures.read_mask(source) if is_file else mask_from(source, name)
        if not mask.any():
            raise InputError(f"{name}: mask is empty, it marks no pixel")
        if mask.shape != (height, width):
            notes.append(f"{name} resized from {mask.shape[1]}x{mask.shape[0]} to {width}x{height}")
            mask = np.array(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
        masks.append(mask)
        names.append(name if is_file else "given")
    note = f" ({'; '.join(notes)})" if notes else ""
    return np.stack(masks), f"face mask: {', '.join(names)}{note}"


def is_box(mask: MaskSource) -> bool:
    """Whether a mask is given as four numbers: left, top, right and bottom, in pixels of the portrait."""
    return isinstance(mask, list | tuple) and len(mask) == 4 and all(isinstance(x, numbers.Real) for x in mask)


def mask_of_box(box: Sequence[float | int], name: str, height: int, width: int) -> Bool[np.ndarray, "{height} {width}"]:
    """Raises InputError: sides that are crossed, or a box that the portrait does not show."""
    left, top, right, bottom = box
    mask = np.zeros((height, width), bool)
    if left < right and top < bottom:
        mask[max(0, round(top)) : max(0, round(bottom)), max(0, round(left)) : max(0, round(right))] = True
    if not mask.any():
        raise InputError(
            f"{name}: the box {list(box)} (left, top, right, bottom) marks no pixel of a portrait of {width}x{height}"
        )
    return mask


def masks_from_boxes(boxes: np.ndarray, size: tuple[int, int]) -> Bool[np.ndarray, "s H W"]:
    """Boxes `[s, 4]` (x, y, width, height in pixels) grown by `FACE_GROWTH` about their centres, left to right.

    Where grown boxes meet, a pixel belongs to the face whose centre is nearest, so no voice moves another's lips.
    """
    height, width = size
    boxes = boxes[np.argsort(boxes[:, 0] + boxes[:, 2] / 2)]
    centres = boxes[:, :2] + boxes[:, 2:] / 2
    y, x = np.mgrid[:height, :width] + 0.5
    offsets = np.abs(np.stack([x, y], -1)[None] - centres[:, None, None])  # [s H W 2]
    inside = (offsets <= FACE_GROWTH / 2 * boxes[:, None, None, 2:]).all(-1)
    nearest = np.argmin((offsets**2).sum(-1), axis=0)
    return inside & (nearest[None] == np.arange(len(boxes))[:, None, None])


def detect_faces(portrait: UInt8[np.ndarray, "H W 3"], model_path: PathLike | None = None) -> Float[np.ndarray, "n 4"]:
    """Boxes of faces (x, y, width, height in pixels), largest first, by MediaPipe's Face Detector task.

    The network sees 128 x 128 pixels, where a face in a wide or a large picture is too small to be found: it is run on
    the whole picture and on overlapping squares of it, and of boxes that cover each other the surest is kept.

    Raises: DetectorUnavailable without mediapipe, the system's libraries that it needs, or its model file; InputError
    for a `model_path` that cannot be used.
    """
    if importlib.util.find_spec("mediapipe") is None:
        raise DetectorUnavailable("mediapipe is not installed (pip install mediapipe)")
    model = find_detector(model_path)
    try:
        import mediapipe
        from mediapipe.tasks.python import BaseOptions, vision
    except (ImportError, OSError) as fault:
        raise DetectorUnavailable(f"mediapipe cannot be loaded ({reason(fault)})") from fault

    scale = min(1.0, DETECTION_SIDE / max(portrait.shape[:2]))
    small = portrait
    if scale < 1:
        size = [max(1, round(side * scale)) for side in portrait.shape[1::-1]]
        small = np.array(Image.fromarray(portrait).resize(size, Image.Resampling.BOX))
    options = vision.FaceDetectorOptions(
        base_options=BaseOptions(model_asset_path=str(model)), min_detection_confidence=MIN_CONFIDENCE
    )
    boxes, scores = [], []
    try:
        with _quiet_native_log(), vision.FaceDetector.create_from_options(options) as detector:
            for x, y, width, height in search_regions(*small.shape[:2]):
                region = np.ascontiguousarray(small[y : y + height, x : x + width])
                picture = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=region)
                for face in detector.detect(picture).detections:
                    box = face.bounding_box
                    boxes.append([x + box.origin_x, y + box.origin_y, box.width, box.height])
                    scores.append(face.categories[0].score)
    except OSError as fault:  # its native part is loaded late
        raise DetectorUnavailable(f"mediapipe cannot be loaded ({reason(fault)})") from fault
    except (RuntimeError, ValueError) as fault:
        raise InputError(f"{model}: not a face detector model that MediaPipe can run") from fault
    kept = surest_boxes(np.array(boxes, np.float64).reshape(-1, 4), np.array(scores)) / scale
    return kept[np.argsort(-kept[:, 2] * kept[:, 3], kind="stable")]


def search_regions(height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Where faces are looked for, as (x, y, width, height): everywhere, then squares of one and half the short side."""
    regions = [(0, 0, width, height)]
    for side in (min(height, width), min(height, width) // 2):
        rows, columns = (np.linspace(0, n - side, max(1, round(2 * n / side) - 1)) for n in (height, width))
        regions += [(int(x), int(y), side, side) for y in rows for x in columns]
    return list(dict.fromkeys(regions))


def surest_boxes(boxes: Float[np.ndarray, "n 4"], scores: np.ndarray) -> Float[np.ndarray, "k 4"]:
    """Without every box of which more than half, or half of a surer one, is covered by a surer one."""
    kept: list[np.ndarray] = []
    for box in boxes[np.argsort(-scores, kind="stable")]:
        overlaps = (
            np.minimum(box[:2] + box[2:], other[:2] + other[2:]) - np.maximum(box[:2], other[:2]) for other in kept
        )
        shared = [np.prod(np.maximum(overlap, 0)) for overlap in overlaps]
        if all(area <= 0.5 * min(box[2:].prod(), other[2:].prod()) for area, other in zip(shared, kept)):
            kept.append(box)
    return np.array(kept).reshape(-1, 4)


@contextlib.contextmanager
def _quiet_native_log() -> Iterator[None]:
    """MediaPipe's C++ runtime reports its start on file descriptor 2, past every Python handle."""
    saved = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
