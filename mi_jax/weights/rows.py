"""From a public checkpoint to a model folder, one row of a leaf at a time.

A family's module holds a table from the modules of our tree to those of the checkpoint; `plan` turns it into rows:
which source tensors make each leaf, or each row of a stacked (scanned) one, and how. `write_model` accounts for every
tensor of the sources, lays out the files, and fills the rows in the order of the sources. The host holds the tensors of
one row; nothing is stacked in memory.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mi_jax.errors import InputError
from mi_jax.files import new_folder
from mi_jax.weights.native import CONFIG, plan_files
from mi_jax.weights.sources import DTYPES, Checkpoint

Shapes = dict[str, tuple[int, ...]]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of our tree, or row `index` of a stacked one: `make(*sources)`.

    axes: the leading axes of the stack, which `index` counts through together. Without sources a row is new, and `make`
    draws it.
    """

    leaf: str
    index: int | None
    sources: tuple[str, ...]
    make: Callable[..., np.ndarray]
    axes: int = 1


@dataclasses.dataclass(frozen=True)
class Part:
    """What one checkpoint gives of the module saved as `name`.

    shapes: of the leaves that `rows` make up. unused: patterns of source names that have no place in our tree, each
    known for what it is.
    """

    name: str
    checkpoint: Checkpoint
    shapes: Shapes
    rows: Sequence[Row]
    unused: Sequence[str] = ()


# --- tables --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A leaf that is no kernel, bias or scale: the full names of its sources, and how they make it."""

    sources: tuple[str, ...]
    make: Callable[..., np.ndarray] = lambda x: x


@dataclasses.dataclass(frozen=True)
class Outputs:
    """A module that holds the outputs of several source modules side by side, or some outputs of one.

    `pick` is applied along the outputs, which come first in PyTorch, of every source's weight and bias.
    """

    modules: tuple[str, ...]
    pick: Callable[[np.ndarray], np.ndarray] = lambda x: x


Table = Mapping[str, str | Outputs | Tensor]
"""Our modules (or leaves) -> theirs. Names with {i} are those of row i of a stack, names with {block} those of a
block, counted through a stack of bodies of several blocks."""


def leaf_shapes(build: Callable[[], nnx.Module]) -> Shapes:
    """The leaves of the module that `build` makes, by dotted path, without making it."""
    state = nnx.state(nnx.eval_shape(build))
    return {".".join(map(str, path)): tuple(leaf.shape) for path, leaf in nnx.to_flat_state(state)}


def plan(shapes: Shapes, table: Table) -> list[Row]:
    """The rows of all leaves, by `table`. A leaf that it lacks is a KeyError."""
    rows = []
    for leaf, shape in shapes.items():
        module, _, kind = leaf.rpartition(".")
        if leaf in table:
            entry = table[leaf]
            names, make = entry.sources, entry.make
        else:
            entry = table[module]
            entry = Outputs((entry,)) if isinstance(entry, str) else entry
            names = tuple(f"{name}.{'bias' if kind == 'bias' else 'weight'}" for name in entry.modules)
            make = _maker(entry.pick, kind)
        if any("{" in name for name in names):
            axes = 2 if "{block}" in names[0] else 1
            for i in range(math.prod(shape[:axes])):
                numbered = tuple(name.format(i=i, block=i) for name in names)
                rows.append(Row(leaf, i, numbered, make, axes))
        else:
            rows.append(Row(leaf, None, names, make))
    return rows


def _maker(pick: Callable, kind: str) -> Callable[..., np.ndarray]:
    def make(*sources: np.ndarray) -> np.ndarray:
        picked = [pick(source) for source in sources]
        whole = picked[0] if len(picked) == 1 else np.concatenate(picked)
        return inputs_first(whole) if kind == "kernel" else whole

    return make


def inputs_first(weight: np.ndarray) -> np.ndarray:
    """PyTorch's [o i ...] as a kernel [... i o]."""
    return np.moveaxis(weight, (0, 1), (-1, -2))


def flat_inputs(weight: np.ndarray) -> np.ndarray:
    """A patch convolution [o c ...] as a kernel of flattened patches [(c ...) o]."""
    return weight.reshape(weight.shape[0], -1).T


# --- accounting ----------------------------------------------------------------------------------------------------


def check(part: Part) -> list[str]:
    """Source names that are known to have no place, after every other name is found to have one.

    Raises:
      InputError: names are unexpected or missing, or make a leaf of another shape; all are listed.
      ValueError: the rows of the part do not make up its leaves.
    """
    filled: dict[str, list[int | None]] = {leaf: [] for leaf in part.shapes}
    axes = {row.leaf: row.axes for row in part.rows}
    for row in part.rows:
        filled[row.leaf].append(row.index)
    for leaf, indices in filled.items():
        if indices != [None] and sorted(indices) != list(range(math.prod(part.shapes[leaf][: axes.get(leaf, 1)]))):
            raise ValueError(f"{part.name}.{leaf} of {part.shapes[leaf]} is made of rows {indices}")

    stored = part.checkpoint.tensors
    wanted = {name for row in part.rows for name in row.sources}
    rest = stored.keys() - wanted
    unused = sorted(name for name in rest if any(re.fullmatch(pattern, name) for pattern in part.unused))
    faults = {
        "unexpected": sorted(rest.difference(unused)),
        "missing": sorted(wanted - stored.keys()),
        "of another shape": [fault for row in part.rows if (fault := _misshapen(part, row))],
    }
    listed = [f"{len(names)} {what}: {', '.join(names)}" for what, names in faults.items() if names]
    if listed:
        raise InputError(f"{part.checkpoint.path}: not the weights of this {part.name}: {'; '.join(listed)}")
    return unused


def _misshapen(part: Part, row: Row) -> str | None:
    stored = part.checkpoint.tensors
    if not row.sources or not all(name in stored for name in row.sources):
        return None
    shape = _row_shape(part, row)
    # Arrays of one repeated zero have the sources' shapes and no memory.
    zeros = [np.broadcast_to(np.zeros((), stored[n].dtype), stored[n].shape) for n in row.sources]
    try:
        made = row.make(*zeros).shape
    except (ValueError, IndexError):
        made = None
    if made == shape:
        return None
    given = ", ".join(f"{name} {stored[name].shape}" for name in row.sources)
    return f"{given} (for {row.leaf} {shape})"


def _row_shape(part: Part, row: Row) -> tuple[int, ...]:
    shape = part.shapes[row.leaf]
    return shape if row.index is None else shape[row.axes :]


# --- writing -------------------------------------------------------------------------------------------------------


def write_model(
    directory: str | os.PathLike,
    parts: Sequence[Part],
    config: dict[str, Any],
    *,
    files: Mapping[str, bytes] | None = None,
    dtype: Any = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Writes a model folder (see `native`) from checkpoints; returns the source names that were not used.

    Floating leaves are stored as `dtype` (a mapping names that of some parts), by default as their sources are. The
    folder is written beside and renamed, config.json last: a half-written one is no model folder. `progress` is
    called with (bytes written, bytes in all).

    Raises:
      InputError: a checkpoint does not fit (see `check`), a value is not finite as `dtype`, or the folder exists or
        cannot be written.
    """
    unused = [name for part in parts for name in check(part)]
    asked = (lambda part: dtype.get(part.name)) if isinstance(dtype, Mapping) else (lambda part: dtype)
    dtypes = {f"{part.name}.{leaf}": _dtype(part, leaf, asked(part)) for part in parts for leaf in part.shapes}
    shapes = {f"{part.name}.{leaf}": shape for part in parts for leaf, shape in part.shapes.items()}
    sizes = {key: int(np.prod(shape)) * dtypes[key].itemsize for key, shape in shapes.items()}
    with new_folder(directory, overwrite=overwrite) as folder:
        places = {}
        for file, keys in plan_files(folder, sizes, max_shard_bytes).items():
            places |= _lay_out(folder / file, {key: (shapes[key], dtypes[key]) for key in keys})
        done = 0
        for part in parts:
            for row, array in _made(part):
                key = f"{part.name}.{row.leaf}"
                array = _cast(key, array, dtypes[key])
                path, first = places[key]
                with path.open("r+b") as file:
                    file.seek(first + (row.index or 0) * array.nbytes)
                    file.write(array.reshape(-1).view(np.uint8))
                done += array.nbytes
                if progress is not None:
                    progress(done, sum(sizes.values()))
        for name, content in (files or {}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return unused


def _made(part: Part):
    """The rows and their arrays in the order of the sources, so that a file is read once from start to end."""
    stored = part.checkpoint.tensors
    place = lambda row: min((stored[name].place for name in row.sources), default=(-1, -1))  # noqa: E731
    name, tensor = None, None  # the last tensor read: neighbouring rows may be parts of it
    for row in sorted(part.rows, key=place):
        shape, arrays = _row_shape(part, row), []
        for source in row.sources:
            if source != name:
                name, tensor = None, None  # freed before the next is read
                name, tensor = source, stored[source].read()
            arrays.append(tensor)
        array = np.asarray(row.make(*arrays))
        if array.shape != shape:
            raise ValueError(f"{part.name}.{row.leaf} is made of shape {array.shape}, not {shape}")
        yield row, array


def _dtype(part: Part, leaf: str, dtype: Any) -> np.dtype:
    """As asked for; or that of the leaf's sources, f32 where they differ; a new leaf has that of the checkpoint."""
    stored = part.checkpoint.tensors
    found = {stored[name].dtype for row in part.rows if row.leaf == leaf for name in row.sources}
    found = found or {next(iter(stored.values())).dtype}
    source = found.pop() if len(found) == 1 else np.dtype(np.float32)
    floating = jnp.issubdtype(source, jnp.floating)
    return np.dtype(dtype) if floating and dtype is not None else source


def _cast(key: str, array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if array.dtype == dtype:
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array.astype(dtype))
    if not np.isfinite(array.astype(np.float32)).all():
        raise InputError(f"{key}: holds values that are not finite as {dtype.name}; store it as another dtype")
    return array


def _lay_out(
    path: pathlib.Path, leaves: dict[str, tuple[tuple[int, ...], np.dtype]]
) -> dict[str, tuple[pathlib.Path, int]]:
    """Writes a safetensors header, makes room for the leaves, and says where each begins."""
    entries, end = {}, 0
    # The widest first: then every leaf is aligned to its own dtype.
    for key, (shape, dtype) in sorted(leaves.items(), key=lambda item: -item[1][1].itemsize):
        size = int(np.prod(shape)) * dtype.itemsize
        entries[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return {key: (path, 8 + len(header) + entry["data_offsets"][0]) for key, entry in entries.items()}


def fold_in(build: Callable[[nnx.Rngs], nnx.Module], seed: int, index: int) -> dict[str, np.ndarray]:
    """The leaves of a module drawn from `seed` for row `index` of a stack."""
    key = jax.random.fold_in(jax.random.key(seed), index)
    state = nnx.to_flat_state(nnx.state(build(nnx.Rngs(key))))
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in state}
