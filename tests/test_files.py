"""What is written appears whole or not at all, and nothing else is touched."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest

from mi_jax import caches
from mi_jax.errors import InputError
from mi_jax.files import check_writable, existing_file, new_folder, refuse_inputs, written_beside


def listed(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_link_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.mp4").symlink_to(tmp_path / "elsewhere" / "real.mp4")
    with written_beside(tmp_path / "out.mp4") as partial:
        assert partial.parent == tmp_path / "elsewhere"
        partial.write_text("video")
    assert (tmp_path / "out.mp4").is_symlink()
    assert (tmp_path / "elsewhere" / "real.mp4").read_text() == "video"
    assert listed(tmp_path / "elsewhere") == ["real.mp4"]


@pytest.mark.parametrize("length", [241, 255])
def test_long_names_are_written_and_longer_ones_refused_at_once(tmp_path, length):
    path = tmp_path / ("o" * (length - 4) + ".mp4")
    with written_beside(path) as partial:
        partial.write_text("x")
    assert path.read_text() == "x"
    with pytest.raises(InputError, match="cannot be written"):
        check_writable(tmp_path / ("o" * 252 + ".mp4"))
    assert listed(tmp_path) == [path.name]


def test_what_a_killed_writer_left_is_swept_and_a_living_ones_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with written_beside(tmp_path / "a.mp4") as partial:
        own = partial.name
        partial.write_text("")
    left = tmp_path / own.replace(f".{os.getpid()}.", f".{dead.pid}.")
    living = tmp_path / own.replace(f".{os.getpid()}.", f".{os.getppid()}.")
    other = tmp_path / ".mi_jax-00000000.1.partial.mp4"
    for path in (left, living, other):
        path.write_text("")
    with written_beside(tmp_path / "a.mp4") as partial:
        partial.write_text("whole")
    assert listed(tmp_path) == sorted(["a.mp4", living.name, other.name])


@pytest.mark.parametrize("writer", [written_beside, new_folder])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, writer):
    with pytest.raises(InputError, match=r"out.* cannot be written .No space left"), writer(tmp_path / "out.d"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert listed(tmp_path) == []


def test_an_input_is_never_the_output(tmp_path):
    (tmp_path / "voice.wav").write_text("")
    (tmp_path / "link.wav").symlink_to("voice.wav")
    os.link(tmp_path / "voice.wav", tmp_path / "hard.wav")
    for out in ("voice.wav", "link.wav", "hard.wav", "./voice.wav"):
        with pytest.raises(InputError, match=r"is the input .*voice\.wav; write to another file"):
            refuse_inputs(tmp_path / out, None, tmp_path / "voice.wav")
    refuse_inputs(tmp_path / "new.mp4", tmp_path / "voice.wav", tmp_path / "missing.wav")


def test_what_is_no_file_is_said(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="picture is a pipe or a device"):
        existing_file(tmp_path / "pipe", "picture")
    with pytest.raises(InputError, match="is a pipe or a device"):
        check_writable(tmp_path / "pipe")
    with pytest.raises(InputError, match="picture not found"):
        existing_file(tmp_path / ("o" * 300), "picture")
    with pytest.raises(InputError, match="does not exist"):
        check_writable(tmp_path / "nowhere" / "a.mp4")


def test_without_a_home_caches_lie_with_temporary_files(monkeypatch):
    monkeypatch.delenv("MI_JAX_CACHE", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    place = caches.cache_dir()
    assert place.is_absolute()
    assert place.name == f"mi_jax-{os.getuid()}"
    monkeypatch.setenv("HOME", "/home/somebody")
    assert caches.cache_dir() == pathlib.Path("/home/somebody/.cache/mi_jax")
