"""Reading public checkpoints: safetensors (whole or split, with an index) and PyTorch's files, one tensor at a time.

Shapes come from the headers. A tensor's bytes are read when it is asked for and are not kept, so a process holds one
tensor of a safetensors checkpoint at a time. A PyTorch file is mapped into memory, and its pages are the system's to
drop.
"""

import dataclasses
import math
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np

from mi_jax.errors import InputError
from mi_jax.files import reason
from mi_jax.untrusted import check_folder, regular_file
from mi_jax.weights.stored import read_header, read_index

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""The numbers of safetensors that are read. 8-bit floats are not: without their scales they are no weights."""

# Where a folder holds several checkpoints (halves, 8-bit copies), these are the plain ones.
_USUAL = (
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "pytorch_model.pt",
    "mp_rank_00_model_states.pt",
)
_TORCH = (".pt", ".pth", ".bin")
_WRAPPERS = ("module", "model", "state_dict")


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor on disk: its shape, dtype, place in the checkpoint (file number, offset) and bytes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    place: tuple[int, int]
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Named tensors on disk. `path` is the file or the index they came from, for messages."""

    path: pathlib.Path
    tensors: dict[str, Stored]

    def shape(self, key: str) -> tuple[int, ...]:
        """Of one tensor.

        Raises:
          InputError: there is none of that name.
        """
        if key not in self.tensors:
            raise InputError(f"{self.path}: holds no {key}")
        return self.tensors[key].shape

    def count(self, prefix: str) -> int:
        """Layers under a name: one more than the highest number that follows `prefix`; 0 without any."""
        numbers = (key[len(prefix) :].split(".")[0] for key in self.tensors if key.startswith(prefix))
        return max((int(number) + 1 for number in numbers if number.isdecimal() and len(number) < 10), default=0)

    def under(self, *prefixes: str) -> "Checkpoint":
        """The same checkpoint without the first of `prefixes` that all of its names begin with."""
        for prefix in prefixes:
            if all(key.startswith(prefix) for key in self.tensors):
                tensors = {key.removeprefix(prefix): tensor for key, tensor in self.tensors.items()}
                return dataclasses.replace(self, tensors=tensors)
        return self


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """The checkpoint of a file, an index or a folder that holds one.

    Raises:
      InputError: there is none, or several; a file is missing, cut short, of another kind, or a pickle of more than
        tensors.
    """
    path = _find(pathlib.Path(path))
    if path.name.endswith(".index.json"):
        files = read_index(path)
    else:
        files = [path]
    tensors: dict[str, Stored] = {}
    for number, file in enumerate(files):
        read = _open_torch if file.suffix in _TORCH else _open_safetensors
        found = read(file, number)
        twice = tensors.keys() & found.keys()
        if twice:
            raise InputError(f"{file}: {_all(twice)} stand in another file of {path.name} too")
        tensors |= found
    return Checkpoint(path, tensors)


def has_checkpoint(folder: str | os.PathLike) -> bool:
    """Whether a folder holds weights of a kind that `open_checkpoint` reads."""
    folder = pathlib.Path(folder)
    return folder.is_dir() and bool(_candidates(folder))


def _all(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _candidates(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints of a folder: indices, and files that no index names."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    indices = [p for p in files if p.name.endswith((".safetensors.index.json", ".bin.index.json"))]
    if indices:
        return indices
    safetensors = [p for p in files if p.suffix == ".safetensors"]
    return safetensors or [p for p in files if p.suffix in _TORCH]


def _find(path: pathlib.Path) -> pathlib.Path:
    if path.is_file():
        return path
    if not path.is_dir():
        if path.exists():
            regular_file(path)  # says what else it is
        raise InputError(f"{path}: no such file or folder")
    check_folder(path)
    found = _candidates(path)
    if not found:
        raise InputError(f"{path}: holds no weights (.safetensors, .pt or .bin)")
    if len(found) > 1:
        usual = [path / name for name in _USUAL if path / name in found]
        if not usual:
            raise InputError(f"{path}: holds several checkpoints: {_all(p.name for p in found)}; name one of them")
        found = usual
    return found[0]


def _open_safetensors(path: pathlib.Path, number: int) -> dict[str, Stored]:
    tensors = {}
    for key, (kind, shape, first, size) in read_header(path).items():
        if kind not in DTYPES:
            raise InputError(f"{path}: {key} is stored as {kind}, which is not read")
        dtype = DTYPES[kind]
        if size != dtype.itemsize * math.prod(shape):
            raise InputError(f"{path}: cut short or not safetensors ({key})")
        read = _reader(path, first, shape, dtype)
        tensors[key] = Stored(shape, dtype, (number, first), read)
    return tensors


def _reader(path: pathlib.Path, first: int, shape: tuple[int, ...], dtype: np.dtype) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        # Read, not mapped: a mapped file would count as this process's memory, page by page, until it is closed.
        array = np.empty(shape, dtype)
        with path.open("rb") as file:
            file.seek(first)
            if file.readinto(array.reshape(-1).view(np.uint8)) != array.nbytes:
                raise InputError(f"{path}: cut short while it was read")
        return array

    return read


def _open_torch(path: pathlib.Path, number: int) -> dict[str, Stored]:
    regular_file(path)
    try:
        import torch
    except ModuleNotFoundError:
        raise InputError(f"{path}: PyTorch's files are read by PyTorch: pip install torch") from None
    import pickle

    with path.open("rb") as file:
        magic = file.read(2)
    if magic not in (b"PK", b"\x80\x02"):  # a zip archive, or a pickle of protocol 2
        raise InputError(f"{path}: cut short or not PyTorch's (it begins with {magic!r})")
    try:
        # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise InputError(f"{path}: a pickle of more than tensors, which could run code; it is not opened") from None
    except Exception as error:  # whatever a damaged pickle makes of torch's unpickler
        raise InputError(f"{path}: cut short or not PyTorch's ({reason(error)})") from None
    for wrapper in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
            break
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise InputError(f"{path}: holds more than named tensors")
    tensors = {}
    for place, (key, tensor) in enumerate(loaded.items()):
        bfloat16 = tensor.dtype == torch.bfloat16
        try:
            view = (tensor.detach().view(torch.int16) if bfloat16 else tensor.detach()).numpy()
        except (TypeError, RuntimeError):  # of 8-bit floats, and of tensors that are sparse or hold no numbers
            raise InputError(f"{path}: {key} is stored as {tensor.dtype}, which is not read") from None
        view = view.view(DTYPES["BF16"]) if bfloat16 else view
        if view.dtype not in DTYPES.values():
            raise InputError(f"{path}: {key} is stored as {tensor.dtype}, which is not read")
        tensors[str(key)] = Stored(tuple(view.shape), view.dtype, (number, place), lambda view=view: view)
    return tensors
