"""The project's own model folders: config.json and safetensors, names = paths in our modules.

    puppet/config.json
    puppet/model.safetensors              "dit.double.blocks.video.out.kernel", "vae.decoder.conv_in.kernel", ...

Large models are split as on the Hugging Face hub: model-00001-of-00003.safetensors ... and an index of them.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mi_jax.errors import InputError
from mi_jax.files import new_folder, reason
from mi_jax.mesh import parameter_spec
from mi_jax.weights import older
from mi_jax.weights.configs import read_json
from mi_jax.weights.stored import read_header, read_index

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def save_model(
    directory: str | os.PathLike,
    modules: dict[str, nnx.Module],
    config: dict[str, Any],
    *,
    dtype: Any = np.float16,
    files: dict[str, bytes] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Writes every leaf of `modules` (floating ones in `dtype`, or, of a mapping, in that of their module), `config` as
    JSON, and `files` (tokenizers) as given.

    The folder is written beside and renamed: under its own name it is always whole. Modules may be spread over the
    devices of several processes: all of them call this, and the first one writes.

    Raises:
      InputError: the folder holds something already and `overwrite` is not set, or cannot be written.
      ValueError: a leaf has no finite value in `dtype` (float16 ends at 65504).
    """
    leaves = {
        f"{name}.{_dotted(path)}": (variable[...], np.dtype(dtype[name] if isinstance(dtype, Mapping) else dtype))
        for name, module in modules.items()
        for path, variable in nnx.to_flat_state(nnx.state(module))
    }
    if jax.process_index():
        for leaf, _ in leaves.values():
            _whole(leaf)
    else:
        with new_folder(directory, overwrite=overwrite) as folder:
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            for name, content in (files or {}).items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
            _write_weights(folder, leaves, max_shard_bytes)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{directory} is written")


def is_model(directory: str | os.PathLike) -> bool:
    """Whether a folder holds weights in this form (they need not be whole)."""
    return any((pathlib.Path(directory) / name).exists() for name in (WEIGHTS, INDEX))


def read_config(directory: str | os.PathLike) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises:
      InputError: it is missing or not a JSON object.
    """
    try:
        return read_json(pathlib.Path(directory) / CONFIG)
    except InputError as error:
        raise InputError(f"{error}; {directory} is no model folder") from None


def load_into(
    directory: str | os.PathLike,
    name: str,
    module: nnx.Module | Callable[[], nnx.Module],
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
) -> nnx.Module:
    """The module saved as `name`. `module` gives its structure: one without arrays, or a function that builds one.

    Floating leaves come as `dtype`. With a mesh each leaf is spread by `parameter_spec`, and a process reads only the
    bytes of its own shards; without one, leaves go to the first device.

    Raises:
      InputError: a weight is missing, unknown or of another shape; a file is missing, cut short or not safetensors.
    """
    directory = pathlib.Path(directory)
    abstract = module if isinstance(module, nnx.Module) else nnx.eval_shape(module)
    graph, state = nnx.split(abstract)
    wanted = {f"{name}.{_dotted(path)}": variable for path, variable in nnx.to_flat_state(state)}
    stored = {key: entry for key, entry in _read_headers(directory).items() if key.startswith(f"{name}.")}
    _account(directory, name, {key: tuple(v.shape) for key, v in wanted.items()}, stored)

    leaves, opened = [], {}
    for path, variable in nnx.to_flat_state(state):
        key = f"{name}.{_dotted(path)}"
        target = dtype if jnp.issubdtype(variable.dtype, jnp.floating) else variable.dtype
        leaves.append((path, variable.replace(_read_leaf(stored[key], opened, target, mesh))))
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def check_weights(directory: str | os.PathLike, modules: Mapping[str, nnx.Module]) -> None:
    """Whether a folder holds all weights of modules without arrays, and no others under their names; by the headers
    alone.

    Raises:
      InputError: as `load_into`.
    """
    headers = _read_headers(pathlib.Path(directory))
    for name, module in modules.items():
        wanted = {f"{name}.{_dotted(path)}": tuple(v.shape) for path, v in nnx.to_flat_state(nnx.state(module))}
        stored = {key: entry for key, entry in headers.items() if key.startswith(f"{name}.")}
        _account(pathlib.Path(directory), name, wanted, stored)


def load_state(directory: str | os.PathLike, name: str) -> Any:
    """Every leaf saved as `name` (an nnx.State), f32, for a module that may have more of them.

    Leaves lie on the mesh in force, spread by `parameter_spec`; without a mesh, on the first device.

    Raises:
      InputError: nothing is saved under that name; a file is missing, cut short or not safetensors.
    """
    directory = pathlib.Path(directory)
    mesh = None if jax.sharding.get_abstract_mesh().empty else jax.sharding.get_mesh()
    leaves, opened = {}, {}
    for key, stored in _read_headers(directory).items():
        part, *names = key.split(".")
        if part == name:
            leaf = _read_leaf(stored, opened, jnp.float32, mesh)
            leaves[tuple(int(n) if n.isdigit() else n for n in names)] = nnx.Param(leaf)
    if not leaves:
        raise InputError(f"{directory}: holds no weights of {name!r}")
    return nnx.from_flat_state(leaves)


def _dotted(path: Iterable[str | int]) -> str:
    return ".".join(map(str, path))


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A leaf on disk: its shape, and the file and name that it is stored under. With `stack` it has as many of these as
    entries along its axis 1 (see `older`)."""

    shape: tuple[int, ...]
    places: tuple[tuple[pathlib.Path, str], ...]
    stack: bool = False


def _read_leaf(stored: _Stored, opened: dict[pathlib.Path, safe_open], dtype: Any, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        sharding = SingleDeviceSharding(jax.local_devices()[0])
    else:
        sharding = NamedSharding(mesh, parameter_spec(stored.shape, mesh))

    def read_part(number: int, index: tuple[slice, ...]) -> np.ndarray:
        path, name = stored.places[number]
        if path not in opened:
            opened[path] = safe_open(path, "numpy")
        return np.asarray(opened[path].get_slice(name)[index] if stored.shape else opened[path].get_tensor(name))

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if not stored.stack:
            return read_part(0, index).astype(dtype, copy=False)
        numbers = range(len(stored.places))[index[1]]
        return np.stack([read_part(n, (index[0], *index[2:])).astype(dtype, copy=False) for n in numbers], axis=1)

    return jax.make_array_from_callback(stored.shape, sharding, read)


def _read_headers(directory: pathlib.Path) -> dict[str, _Stored]:
    """Every stored weight, by its name of today."""
    index = directory / INDEX
    stored = {}
    for path in read_index(index) if index.exists() else [directory / WEIGHTS]:
        shapes = {key: entry.shape for key, entry in read_header(path).items()}
        try:
            with safe_open(path, "numpy"):  # holds the bytes against the header
                stored |= {key: _Stored(shape, ((path, key),)) for key, shape in shapes.items()}
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: cut short or not safetensors ({reason(error)})") from None
    for key, names in older.joined(stored).items():
        parts = [stored.pop(name) for name in names]
        shape = (parts[0].shape[0], len(parts), *parts[0].shape[1:])
        stored[key] = _Stored(shape, tuple(place for part in parts for place in part.places), stack=True)
    return stored


def _account(
    directory: pathlib.Path, name: str, wanted: dict[str, tuple[int, ...]], stored: dict[str, _Stored]
) -> None:
    shapes = {key: leaf.shape for key, leaf in stored.items()}
    misshapen = [
        f"{key} is {shapes[key]}, not {wanted[key]}"
        for key in sorted(wanted.keys() & shapes.keys())
        if shapes[key] != wanted[key]
    ]
    faults = {
        "missing": sorted(wanted.keys() - shapes.keys()),
        "unknown": sorted(shapes.keys() - wanted.keys()),
        "of another shape": misshapen,
    }
    listed = [f"{len(keys)} {what}: {_some(keys)}" for what, keys in faults.items() if keys]
    if listed:
        raise InputError(f"{directory}: the weights of {name!r} do not fit its config: {'; '.join(listed)}")


def _some(keys: list[str], most: int = 5) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _write_weights(
    folder: pathlib.Path, leaves: dict[str, tuple[jax.Array | np.ndarray, np.dtype]], max_shard_bytes: int
) -> None:
    sizes = {
        key: leaf.size * (dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype).itemsize
        for key, (leaf, dtype) in leaves.items()
    }
    for file, keys in plan_files(folder, sizes, max_shard_bytes).items():
        save_file({key: _to_disk(key, *leaves[key]) for key in keys}, folder / file)
        shutil.copymode(folder / CONFIG, folder / file)  # safetensors' own is for its user's eyes alone


def plan_files(folder: pathlib.Path, sizes: dict[str, int], max_shard_bytes: int) -> dict[str, list[str]]:
    """Which leaves (`sizes` in bytes) go into which file; of more than one, the index is written."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, bytes_ in sizes.items():
        if shards[-1] and size + bytes_ > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += bytes_
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": keys for i, keys in enumerate(shards, start=1)}
    weight_map = {key: file for file, keys in files.items() for key in keys}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return files


def _whole(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """An array on the host; where no process has all of it, every process asks for it at the same time."""
    elsewhere = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True) if elsewhere else leaf)


def _to_disk(key: str, leaf: jax.Array | np.ndarray, dtype: np.dtype) -> np.ndarray:
    array = _whole(leaf)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return np.ascontiguousarray(array) if array.ndim else array
    with np.errstate(over="ignore"):
        array = np.array(array, dtype, order="C")
    if not np.isfinite(array).all():
        raise ValueError(f"{key}: holds values that are not finite as {dtype.name}")
    return array
