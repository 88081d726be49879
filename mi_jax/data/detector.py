"""The model file of MediaPipe's face detector: named by the user, kept from before, or downloaded."""

import hashlib
import os
import pathlib
import urllib.error
import urllib.request

from mi_jax.caches import cache_dir
from mi_jax.errors import InputError
from mi_jax.files import PathLike, existing_file, written_beside

DETECTOR_URL = (
    "https://storage.googleapis.com/mediapipe-models/face_model/"
    "blaze_face_short_range/float16/1/blaze_face_short_range.tflite"
)
DETECTOR_SHA256 = "b4578f35940bf5a1a655214a1cce5cab13eba73c1297cd78e1a04c2380b0152f"
DOWNLOAD_TIMEOUT = 5.0  # seconds: offline is a normal state, not worth a long wait
VARIABLE = "MI_JAX_FACE_MODEL"


class DetectorUnavailable(Exception):
    """Faces cannot be looked for here; the message says why, and what would help."""


def kept_detector() -> pathlib.Path:
    """Where the model is kept once it is downloaded, or put by hand."""
    return cache_dir() / pathlib.PurePosixPath(DETECTOR_URL).name


def named_detector(path: PathLike | None = None) -> pathlib.Path | None:
    """The file that the user names: `path`, else MI_JAX_FACE_MODEL.

    Raises:
      InputError: there is no such file.
    """
    if path is not None:
        return existing_file(path, "face detector model")
    told = os.environ.get(VARIABLE)
    return existing_file(told, f"face detector model ({VARIABLE})") if told else None


def find_detector(path: PathLike | None = None) -> pathlib.Path:
    """The model file: `named_detector`, else the one that is kept, else downloaded and kept. The latter two are checked
    by their SHA-256.

    Raises:
      InputError: a file that is named is not there.
      DetectorUnavailable: nothing is kept, and it cannot be downloaded or is not what it should be.
    """
    named = named_detector(path)
    if named is not None:
        return named
    kept = kept_detector()
    if is_detector(kept):
        return kept
    by_hand = f"save {DETECTOR_URL} as {kept}, or name its file (--face-model or {VARIABLE})"
    try:
        with urllib.request.urlopen(DETECTOR_URL, timeout=DOWNLOAD_TIMEOUT) as response:
            data = response.read()
    except (urllib.error.URLError, OSError) as fault:
        raise DetectorUnavailable(f"no face detector model: it could not be downloaded; {by_hand}") from fault
    if _sha256(data) != DETECTOR_SHA256:
        raise DetectorUnavailable(f"no face detector model: the download has an unexpected checksum; {by_hand}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(kept) as partial:
            partial.write_bytes(data)
    except (OSError, InputError) as fault:
        raise DetectorUnavailable(
            f"no face detector model: {kept.parent} cannot hold it; set MI_JAX_CACHE to a folder that can"
        ) from fault
    return kept


def is_detector(path: pathlib.Path) -> bool:
    """Whether the file is there and whole."""
    return path.is_file() and _sha256(path.read_bytes()) == DETECTOR_SHA256


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
