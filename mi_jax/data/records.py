"""Prepared examples on disk: ArrayRecord shards whose records are dicts of NumPy arrays, and a Grain source over them.

A folder holds `records-00000-of-00004.arrayrecord` ... and index.json, which says what to expect. One record is one
safetensors buffer: self-describing, and it keeps float16 and bfloat16. Records are groups of their own, so that any one
of them is a single read.
"""

import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any, SupportsIndex

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from mi_jax.errors import InputError
from mi_jax.files import new_folder

INDEX = "index.json"

# Names of the safetensors format. Its own NumPy reader lacks bfloat16 for buffers in memory.
_DTYPES = {
    "BOOL": np.bool_,
    **{f"U{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    **{f"I{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    **{f"F{8 * n}": np.dtype(f"f{n}") for n in (2, 4, 8)},
    "BF16": ml_dtypes.bfloat16,
}


_TIMED = {"face_mask": (4, 1)}
"""Leaves that have a time axis in some records and lack it in others, where they hold for a whole clip: how many axes
they have with it, and which it is."""


def decode(buffer: bytes) -> dict[str, np.ndarray]:
    """The arrays of one record.

    Raises:
      safetensors.SafetensorError: not a whole safetensors buffer.
    """
    return {
        name: np.frombuffer(leaf["data"], _DTYPES[leaf["dtype"]]).reshape(leaf["shape"])
        for name, leaf in sorted(safetensors.deserialize(buffer))
    }


def write_records(
    directory: str | os.PathLike,
    records: Iterable[dict[str, np.ndarray]],
    *,
    records_per_shard: int = 256,
    meta: dict[str, Any] | None = None,
    compression: str = "uncompressed",
) -> int:
    """Writes `records` as shards and an index; returns how many there were.

    The folder appears under its name only when it is complete: it is written beside and renamed. All records have the
    same keys, dtypes and numbers of axes; sizes may differ, and `face_mask` may be [s h w] in some records and
    [s t h w] in others. `meta` is any JSON object and is read back as `RecordSource.meta`.
    `compression` is ArrayRecord's option, "uncompressed" or e.g. "zstd:3" (half-precision features hardly shrink).

    Raises:
      InputError: the folder exists already or cannot be written; the records differ in keys or dtypes; there is none.
    """
    with new_folder(directory) as folder:
        index = _write_shards(folder, records, records_per_shard, compression)
        (folder / INDEX).write_text(json.dumps(index | {"meta": meta or {}}, indent=2) + "\n")
    return index["count"]


class RecordSource:
    """A Grain random-access source: `source[i]` is record i as a dict of NumPy arrays. May be pickled to workers.

    Raises:
      InputError: on opening, the folder, its index or a shard is missing or cut short; on reading, a record is damaged.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = pathlib.Path(directory)
        index = _read_index(self.directory)
        self.count: int = index["count"]
        self.leaves: dict[str, dict[str, Any]] = index["leaves"]
        """Per key: dtype, and the shape, with null where records differ. A `face_mask` that has a time axis in some
        records alone has null there."""
        self.meta: dict[str, Any] = index["meta"]
        paths = []
        for shard in index["shards"]:
            path = self.directory / shard["file"]
            if not path.is_file():
                raise InputError(f"{path}: no such file, but {INDEX} names it")
            if path.stat().st_size != shard["bytes"]:
                raise InputError(f"{path}: {path.stat().st_size} bytes, {INDEX} says {shard['bytes']}: cut short?")
            paths.append(str(path))
        try:
            self._shards = ArrayRecordDataSource(paths)
            found = len(self._shards)
        except RuntimeError as error:
            raise InputError(f"{self.directory}: a shard is damaged ({str(error).splitlines()[0]})") from None
        if found != self.count:
            raise InputError(f"{self.directory}: {found} records in the shards, {INDEX} says {self.count}")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, record_key: SupportsIndex) -> dict[str, np.ndarray]:
        i = int(record_key)
        if not 0 <= i < self.count:
            raise IndexError(f"{self.directory}: record {i} of {self.count}")
        try:
            return decode(self._shards[i])
        except (safetensors.SafetensorError, RuntimeError, ValueError, LookupError) as error:
            raise InputError(f"{self.directory}: record {i} is damaged ({str(error).splitlines()[0]})") from None

    def __repr__(self) -> str:
        return f"RecordSource({str(self.directory)!r}, {self.count} records)"


def _read_index(directory: pathlib.Path) -> dict[str, Any]:
    path = directory / INDEX
    try:
        index = json.loads(path.read_text())
        for shard in index["shards"]:
            if path.with_name(shard["file"]).name != shard["file"]:
                raise ValueError("a shard lies elsewhere")
            _check_numbers(shard["bytes"], shard["records"])
        _check_numbers(index["count"])
        if index["count"] != sum(shard["records"] for shard in index["shards"]):
            raise ValueError("its counts do not add up")
        if not (isinstance(index["leaves"], dict) and isinstance(index["meta"], dict)):
            raise ValueError("its leaves or meta are no objects")
        for leaf in index["leaves"].values():
            _check_numbers(*(side for side in leaf["shape"] if side is not None))
            if leaf["dtype"] is not None and not isinstance(leaf["dtype"], str):
                raise ValueError("a leaf's dtype is no name")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {directory} is no folder of records") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not an index of records ({error})") from None
    return index


def _check_numbers(*values: Any) -> None:
    for value in values:
        if type(value) is not int or value < 0:
            raise ValueError(f"{value!r} is no count")


def _write_shards(
    folder: pathlib.Path, records: Iterable[dict[str, np.ndarray]], per_shard: int, compression: str
) -> dict[str, Any]:
    """Shards under provisional names first: how many there will be is known only at the end."""
    summary, counts = _Summary(), []
    for buffer in map(summary.encode, records):
        if not counts or counts[-1] == per_shard:
            if counts:
                writer.close()
            writer = ArrayRecordWriter(str(folder / f"{len(counts)}"), f"group_size:1,{compression}")
            counts.append(0)
        writer.write(buffer)
        counts[-1] += 1
    if not counts:
        raise InputError(f"{folder.name}: there is not a single record to write")
    writer.close()
    shards = []
    for i, count in enumerate(counts):
        path = (folder / str(i)).rename(folder / f"records-{i:05d}-of-{len(counts):05d}.arrayrecord")
        shards.append({"file": path.name, "records": count, "bytes": path.stat().st_size})
    return {"count": sum(counts), "shards": shards, "leaves": summary.leaves}


class _Summary:
    """Encodes records and keeps what is common to all of them."""

    def __init__(self):
        self.leaves: dict[str, dict[str, Any]] = {}
        self._count = 0

    def encode(self, record: dict[str, np.ndarray]) -> bytes:
        arrays = {name: np.ascontiguousarray(x) if x.ndim else x for name, x in record.items()}
        leaves = {name: {"dtype": x.dtype.name, "shape": list(x.shape)} for name, x in arrays.items()}
        for name in _TIMED.keys() & leaves.keys() & self.leaves.keys():
            _align(name, leaves[name]["shape"], self.leaves[name]["shape"])
        dtypes = {name: (leaf["dtype"], len(leaf["shape"])) for name, leaf in leaves.items()}
        first = {name: (leaf["dtype"], len(leaf["shape"])) for name, leaf in self.leaves.items()}
        if self._count and dtypes != first:
            odd = sorted(name for name in dtypes.keys() | first.keys() if dtypes.get(name) != first.get(name))
            raise InputError(f"record {self._count}: {odd[0]} is {dtypes.get(odd[0])}, in record 0 {first.get(odd[0])}")
        for name, leaf in leaves.items():
            known = self.leaves.setdefault(name, leaf)
            known["shape"] = [n if n == m else None for n, m in zip(known["shape"], leaf["shape"])]
        self._count += 1
        return safetensors.numpy.save(arrays)


def _align(name: str, *shapes: list[int | None]) -> None:
    """Gives those of `shapes` that lack the time axis one of unknown size, where another has it."""
    full, time = _TIMED[name]
    if {len(shape) for shape in shapes} == {full - 1, full}:
        for shape in shapes:
            if len(shape) < full:
                shape.insert(time, None)
