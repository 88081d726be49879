"""The headers and indices of safetensors: what is stored under which name, judged before anything large is read."""

import json
import pathlib
from typing import NamedTuple

from mi_jax.bounds import shown
from mi_jax.errors import InputError
from mi_jax.files import reason
from mi_jax.untrusted import MOST_BYTES, read_json, regular_file


def read_index(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that an index of weights names, all in its folder.

    Raises:
      InputError: it is no index, or names a file that is not in its folder.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{path}: not an index of weights (it has no weight_map of names)")
    files = sorted(set(weight_map.values()))
    for file in files:
        name = pathlib.PurePath(file)
        if not file or len(file) > 255 or "\\" in file or name.is_absolute() or ".." in name.parts:
            raise InputError(f"{path}: names {shown(file)}, which is no file in its folder")
    return [path.parent / file for file in files]


class Entry(NamedTuple):
    """A tensor of a safetensors file: what numbers, of what shape, and where its bytes begin in the file."""

    dtype: str
    shape: tuple[int, ...]
    first: int
    size: int


def read_header(path: pathlib.Path) -> dict[str, Entry]:
    """The tensors of a safetensors file: 8 bytes of header length, a JSON header (dtype, shape and byte range of each
    tensor), the bytes.

    Raises:
      InputError: the file is missing, no regular file, cut short or not safetensors.
    """
    path = regular_file(path)
    broken = InputError(f"{path}: cut short or not safetensors")
    try:
        with path.open("rb") as file:
            length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
            if not 2 <= length <= min(size - 8, MOST_BYTES):
                raise ValueError
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {key: _entry(8 + length, **entry) for key, entry in header.items()}
    except OSError as error:
        raise InputError(f"{path}: {reason(error)}") from None
    except (AttributeError, TypeError, ValueError, RecursionError):
        raise broken from None
    if not all(8 + length <= entry.first <= entry.first + entry.size <= size for entry in entries.values()):
        raise broken
    return entries


def _entry(begin: int, dtype: str, shape: list[int], data_offsets: list[int]) -> Entry:
    start, end = data_offsets
    if not isinstance(dtype, str) or not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError
    return Entry(dtype, tuple(shape), begin + start, end - start)
