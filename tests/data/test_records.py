import json
import pathlib
import pickle
import re

import grain
import ml_dtypes
import numpy as np
import pytest

from mi_jax.data.records import RecordSource, write_records
from mi_jax.errors import InputError


def records(count):
    """Arrays of every kind that features come in; `latents` has another length in each record."""
    rng = np.random.default_rng(0)
    for i in range(count):
        yield {
            "latents": rng.normal(size=(i + 1, 4)).astype(np.float16),
            "tokens": rng.normal(size=(3, 2)).astype(ml_dtypes.bfloat16),
            "mask": rng.random(5) < 0.5,
            "index": np.array(i, np.int64),
            "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        }


@pytest.fixture
def folder(tmp_path):
    write_records(tmp_path / "train", records(10), records_per_shard=4, meta={"model": "puppet", "sizes": [96, 96]})
    return tmp_path / "train"


def shards(folder):
    return sorted(pathlib.Path(folder).glob("*.arrayrecord"))


def test_what_is_read_is_what_was_written(folder):
    source = RecordSource(folder)
    assert len(source) == 10
    assert source.meta == {"model": "puppet", "sizes": [96, 96]}
    for i, expected in enumerate(records(10)):
        record = source[i]
        assert record.keys() == expected.keys()
        for name, array in expected.items():
            assert record[name].dtype == array.dtype
            assert record[name].shape == array.shape
            np.testing.assert_array_equal(record[name], array)


def test_the_index_says_what_to_expect(folder):
    index = json.loads((folder / "index.json").read_text())
    assert index["leaves"]["latents"] == {"dtype": "float16", "shape": [None, 4]}
    assert index["leaves"]["tokens"] == {"dtype": "bfloat16", "shape": [3, 2]}
    assert [shard["records"] for shard in index["shards"]] == [4, 4, 2]
    assert [shard["file"] for shard in index["shards"]] == [path.name for path in shards(folder)]


@pytest.mark.parametrize("order", [(0, 1, 0), (1, 0, 1)])
def test_face_masks_of_a_clip_and_of_its_frames_stand_in_one_folder(tmp_path, order):
    """Where they are mixed, the index has the time axis, of no one length."""
    kinds = [np.zeros((1, 4, 6), np.float32), np.ones((2, 3, 4, 6), np.float32)]
    write_records(tmp_path / "mixed", [{"face_mask": kinds[kind]} for kind in order])
    source = RecordSource(tmp_path / "mixed")
    assert source.leaves["face_mask"] == {"dtype": "float32", "shape": [None, None, 4, 6]}
    for record, kind in zip(source, order):
        np.testing.assert_array_equal(record["face_mask"], kinds[kind])
    for kind, shape in enumerate(([1, 4, 6], [2, 3, 4, 6])):
        write_records(tmp_path / str(kind), [{"face_mask": kinds[kind]}] * 2)
        assert RecordSource(tmp_path / str(kind)).leaves["face_mask"]["shape"] == shape
    with pytest.raises(InputError, match=r"record 1: face_mask is \('float32', 2\), in record 0 \('float32', 3\)"):
        write_records(tmp_path / "odd", [{"face_mask": kinds[0]}, {"face_mask": kinds[0][0]}])
    with pytest.raises(InputError, match=r"record 1: x is \('float32', 4\), in record 0 \('float32', 3\)"):
        write_records(tmp_path / "odd", [{"x": kinds[0]}, {"x": kinds[1]}])


def test_zstd_holds_the_same_in_fewer_bytes(tmp_path):
    zeros = [{"x": np.zeros(100_000, np.float32)}] * 2
    write_records(tmp_path / "plain", zeros)
    write_records(tmp_path / "zstd", zeros, compression="zstd:3")
    plain, packed = (sum(path.stat().st_size for path in shards(tmp_path / name)) for name in ("plain", "zstd"))
    assert packed < plain / 5
    np.testing.assert_array_equal(RecordSource(tmp_path / "zstd")[1]["x"], zeros[1]["x"])


def test_grain_reads_each_record_once_an_epoch_and_workers_may_have_the_source(folder):
    source = pickle.loads(pickle.dumps(RecordSource(folder)))
    dataset = grain.MapDataset.source(source).seed(3).shuffle().to_iter_dataset()
    order = [int(record["index"]) for record in dataset]
    assert sorted(order) == list(range(10))
    assert order != sorted(order)


def test_indices_outside_the_source_are_refused(folder):
    source = RecordSource(folder)
    for i in (-1, 10):
        with pytest.raises(IndexError, match=f"record {i} of 10"):
            source[i]


def test_a_missing_folder_index_or_shard_is_named(folder, tmp_path):
    with pytest.raises(InputError, match=r"nowhere/index\.json: no such file"):
        RecordSource(tmp_path / "nowhere")
    shards(folder)[1].unlink()
    with pytest.raises(InputError, match=r"records-00001-of-00003\.arrayrecord: no such file"):
        RecordSource(folder)
    (folder / "index.json").write_text('{"count": 3')
    with pytest.raises(InputError, match=r"index\.json: not an index of records"):
        RecordSource(folder)
    (folder / "index.json").write_text('{"count": 3, "shards": [], "leaves": {}, "meta": {}}')
    with pytest.raises(InputError, match="counts do not add up"):
        RecordSource(folder)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda index: index.update(count=10.0), "10.0 is no count"),
        (lambda index: index.update(count=True), "True is no count"),
        (lambda index: index["shards"][0].update(records=4.0), "4.0 is no count"),
        (lambda index: index["shards"][0].update(bytes="9"), "'9' is no count"),
        (lambda index: index["shards"][0].update(file="../" + index["shards"][0]["file"]), ""),
        (lambda index: index["shards"][0].update(file=3), ""),
        (lambda index: index["leaves"]["latents"].update(shape=[4.5]), "4.5 is no count"),
        (lambda index: index["leaves"]["latents"].update(shape=None), ""),
        (lambda index: index["leaves"]["latents"].update(dtype=[]), "a leaf's dtype is no name"),
        (lambda index: index["leaves"].update(latents=3), ""),
        (lambda index: index.update(shards={"a": 1}), ""),
        (lambda index: index.update(leaves=[]), "no objects"),
    ],
)
def test_an_index_of_other_kinds_is_one_line(folder, change, fault):
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=rf"index\.json: not an index of records \(.*{re.escape(fault)}") as caught:
        RecordSource(folder)
    assert "\n" not in str(caught.value)


def test_a_truncated_shard_is_named(folder):
    path = shards(folder)[2]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"records-00002-of-00003\.arrayrecord: \d+ bytes.*cut short"):
        RecordSource(folder)


def test_a_damaged_record_is_found_when_it_is_read(folder):
    path = shards(folder)[0]
    content = bytearray(path.read_bytes())
    at = content.index(next(records(1))["latents"].tobytes())
    content[at] ^= 0xFF
    path.write_bytes(content)
    source = RecordSource(folder)
    with pytest.raises(InputError, match="record 0 is damaged"):
        source[0]
    assert int(source[1]["index"]) == 1


def test_a_damaged_shard_directory_is_found_when_it_is_opened(folder):
    path = shards(folder)[0]
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(InputError, match="damaged"):
        RecordSource(folder)


def test_nothing_is_left_of_a_write_that_fails(tmp_path):
    def broken():
        yield from records(5)
        raise RuntimeError("the source fails")

    with pytest.raises(RuntimeError, match="the source fails"):
        write_records(tmp_path / "out", broken(), records_per_shard=2)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_beside_is_replaced(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "0").write_text("half a shard")
    assert write_records(tmp_path / "out", records(3)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(shards(tmp_path / "out")) == 1


def test_records_that_cannot_be_written_are_the_users_fault(folder, tmp_path):
    with pytest.raises(InputError, match="exists already"):
        write_records(folder, records(1))
    with pytest.raises(InputError, match="not a single record"):
        write_records(tmp_path / "none", iter(()))
    with pytest.raises(InputError, match=r"record 1: x is \('float16', 1\), in record 0 \('float32', 1\)"):
        write_records(tmp_path / "odd", [{"x": np.zeros(3, np.float32)}, {"x": np.zeros(3, np.float16)}])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_records(tmp_path / "file" / "out", records(1))
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "odd").exists()
