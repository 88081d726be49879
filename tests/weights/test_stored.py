"""Indices, headers and files from elsewhere: what is none is refused in a line, before it is read or waited for."""

import contextlib
import json
import os
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from mi_jax.errors import InputError
from mi_jax.untrusted import MOST_BYTES, check_folder, read_json, regular_file
from mi_jax.weights.native import load_into, read_config
from mi_jax.weights.sources import open_checkpoint
from mi_jax.weights.stored import read_header

INDEX = "model.safetensors.index.json"


class Net(nnx.Module):
    def __init__(self, rngs):
        self.kernel = nnx.Param(jnp.zeros((2, 3)))


def load(folder):
    return load_into(folder, "net", lambda: Net(nnx.Rngs(0)))


READERS = {"a model folder": load, "a public checkpoint": open_checkpoint}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"net.kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, folder / "model.safetensors")
    return folder


@contextlib.contextmanager
def at_once():
    """Whoever waits for a pipe is woken, and has failed."""

    def woken(*_):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, woken)
    signal.alarm(5)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(reader, folder) -> str:
    with pytest.raises(InputError) as caught, at_once():
        reader(folder)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 400
    return said


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    ("named", "fault"),
    [
        ("../model/model.safetensors", "which is no file in its folder"),
        ("a/../../model/model.safetensors", "which is no file in its folder"),
        ("/etc/passwd", "which is no file in its folder"),
        ("..\\model.safetensors", "which is no file in its folder"),
        ("", "which is no file in its folder"),
        (".", "a folder, a file is needed"),
        ("gone.safetensors", "gone.safetensors: No such file"),
        ("a\0b", "embedded null"),
        ("a" * 5000, "which is no file in its folder"),
        (3, "not an index of weights"),
        (None, "not an index of weights"),
        (["model.safetensors"], "not an index of weights"),
    ],
)
def test_an_index_names_files_of_its_folder(folder, reader, named, fault):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"net.kernel": named}}))
    assert fault in refused(reader, folder)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', "[]", "{", "[" * 10**5, '{"weight_map": 1e999}', "\xff"])
def test_an_index_that_is_none(folder, reader, text):
    (folder / INDEX).write_text(text, encoding="latin-1")
    assert INDEX in refused(reader, folder)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_links_are_followed_as_the_hub_lays_them(folder, reader, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (folder / "model.safetensors").rename(blobs / "0123abcd")
    (blobs / "4567").write_text(json.dumps({"weight_map": {"net.kernel": "model-1.safetensors"}}))
    (snapshot / "model-1.safetensors").symlink_to("../../blobs/0123abcd")
    (snapshot / INDEX).symlink_to("../../blobs/4567")
    read = reader(snapshot)
    kernel = read.kernel[...] if isinstance(read, Net) else read.tensors["net.kernel"].read()
    np.testing.assert_array_equal(kernel, np.arange(6).reshape(2, 3))


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
    ("name", "reader"),
    [
        ("config.json", read_config),
        ("config.json", check_folder),
        ("tokenizer.json", check_folder),
        ("model.safetensors", load),
        ("model.safetensors", open_checkpoint),
        ("model.safetensors", lambda folder: open_checkpoint(folder / "model.safetensors")),
        (INDEX, load),
        (INDEX, open_checkpoint),
        ("a.pt", lambda folder: open_checkpoint(folder / "a.pt")),
        ("a.json", lambda folder: read_json(folder / "a.json")),
    ],
)
def test_pipes_and_devices_are_not_opened(folder, kind, name, reader):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to("/dev/zero")
    assert f"{name}: a pipe or a device, a file is needed" in refused(reader, folder)


def written(folder, header, *, length=None, body=bytes(24)):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + body)


def tensor(dtype="F32", shape=(2, 3), offsets=(0, 24), **more):
    return {"net.kernel": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    "header",
    [
        [],
        {"net.kernel": []},
        {"net.kernel": {"dtype": "F32"}},
        tensor(dtype=3),
        tensor(shape=(-2, -3)),
        tensor(shape=("2", 3)),
        tensor(shape=(2.0, 3)),
        tensor(shape=(True, 6)),
        tensor(shape=(2, 4)),
        tensor(shape=(2**32, 2**32), offsets=(0, 0)),  # their product is 0 in 64 bits
        tensor(offsets=(0, 28)),
        tensor(offsets=(-4, 20)),
        tensor(offsets=(24, 0)),
        tensor(offsets=(0, 24, 24)),
        tensor(offsets=(0, 10**30)),
        b"[" * 10**5,
        b"\xff\xfe",
        b'{"a": 1',
    ],
)
def test_a_header_that_its_file_does_not_bear_out(folder, reader, header):
    written(folder, header)
    assert "model.safetensors: cut short or not safetensors" in refused(reader, folder)


@pytest.mark.parametrize("length", [0, 1, 10**6, MOST_BYTES + 1, 2**63, 2**64 - 1])
def test_a_header_of_any_length_is_read_only_within_its_file_and_reason(folder, length):
    """A file of a terabyte of nothing takes no room on the disk, and none in memory."""
    written(folder, tensor(), length=length)
    if length <= 2**40:
        os.truncate(folder / "model.safetensors", max(2**40 * (length > MOST_BYTES), 1000))
    for reader in (*READERS.values(), lambda folder: read_header(folder / "model.safetensors")):
        assert "cut short or not safetensors" in refused(reader, folder)


def test_a_whole_header_is_read(folder):
    written(folder, tensor() | {"__metadata__": {"format": "pt"}})
    header = json.dumps(tensor() | {"__metadata__": {"format": "pt"}})
    assert read_header(folder / "model.safetensors") == {"net.kernel": ("F32", (2, 3), 8 + len(header), 24)}


def test_a_config_is_not_read_whatever_its_length(folder):
    (folder / "config.json").write_text("{}")
    os.truncate(folder / "config.json", MOST_BYTES + 1)
    assert "longer than 100 MB" in refused(read_config, folder)


def test_what_else_is_no_file(folder):
    assert regular_file(folder / "model.safetensors") == folder / "model.safetensors"
    assert "a folder, a file is needed" in refused(regular_file, folder)
    assert "No such file" in refused(regular_file, folder / "none")
    assert "null" in refused(regular_file, folder / "a\0b")
