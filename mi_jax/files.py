"""Files and folders that are asked for by name, and that appear under their name only when they are whole."""

import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Iterator

import numpy as np

from mi_jax.errors import InputError

PathLike = str | os.PathLike
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
"""Full disk, full quota, a file beyond its limit, and disks that fail: no fault of the program."""


def existing_file(path: PathLike, what: str) -> pathlib.Path:
    """`path` as a Path; raises InputError when there is no such file. `what` names its role in the message."""
    path = pathlib.Path(path)
    try:
        if path.is_dir():
            raise InputError(f"{path}: {what} is a folder, a file is needed")
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: {what} is a pipe or a device, a file is needed; write it to one first")
        if not path.is_file():
            raise InputError(f"{path}: {what} not found")
    except (OSError, ValueError) as fault:  # a name that no file can have
        if isinstance(fault, InputError):
            raise
        raise InputError(f"{path}: {what} not found ({reason(fault)})") from None
    return path


def check_writable(path: PathLike) -> pathlib.Path:
    """`path` as a Path; raises InputError unless a file can be created (or replaced) there. Leaves nothing behind."""
    path = pathlib.Path(path)
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder, a file name is needed")
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is a pipe or a device, a file name is needed")
        target = pathlib.Path(os.path.realpath(path))
        if not target.parent.is_dir():
            raise InputError(f"{path}: output folder {target.parent} does not exist")
        _try_name(target)
        try:
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".writable"):
                pass
        except OSError as fault:
            raise InputError(f"{path}: output folder {target.parent} is not writable ({reason(fault)})") from fault
    except (OSError, ValueError) as fault:
        if isinstance(fault, InputError):  # a ValueError, too
            raise
        raise InputError(f"{path}: cannot be written ({reason(fault)})") from fault
    return path


def _try_name(target: pathlib.Path) -> None:
    """Raises OSError where no file can have this name."""
    with contextlib.suppress(FileNotFoundError):
        os.stat(target)


def refuse_inputs(out: PathLike, *inputs: PathLike | None) -> None:
    """Whether writing the file `out` would replace what it is made from, also through links.

    Raises:
      InputError: one of `inputs` is `out`.
    """
    for path in (pathlib.Path(path) for path in inputs if path is not None):
        with contextlib.suppress(OSError):
            if os.path.samefile(out, path):
                raise InputError(f"{out}: is the input {path}; write to another file")


@contextlib.contextmanager
def written_beside(path: PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary name beside `path`, in the folder of the file that a link points to; renames it on success,
    removes it on any error. What a killed writer of the same file left is removed, too.

    Raises:
      InputError: no file can be written there; the disk is full.
    """
    target = pathlib.Path(os.path.realpath(check_writable(path)))
    name = f".mi_jax-{zlib.crc32(target.name.encode(errors='surrogateescape')):08x}"
    for left in target.parent.glob(f"{name}.*.partial*"):
        if not _alive(left.name.split(".")[2]):
            left.unlink(missing_ok=True)
    partial = target.with_name(f"{name}.{os.getpid()}.partial{target.suffix[-16:]}")
    try:
        with disk_faults_named(path):
            yield partial
            os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_faults_named(path: PathLike) -> Iterator[None]:
    """A full or failing disk, met while `path` is written, is an InputError."""
    try:
        yield
    except OSError as fault:
        if fault.errno in DISK_FAULTS:
            raise InputError(f"{path}: cannot be written ({reason(fault)})") from fault
        raise


def _alive(process: str) -> bool:
    """Whether a process of this number is running; of what is no number, it is said to."""
    if not process.isdigit():
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


@contextlib.contextmanager
def locked(folder: PathLike, what: str) -> Iterator[None]:
    """Nobody else has `folder` meanwhile; a process that dies gives it back.

    Raises:
      InputError: another process has it.
    """
    with open(pathlib.Path(folder) / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: {what} is under way there, in another process") from None
        yield


@contextlib.contextmanager
def new_folder(directory: PathLike, *, overwrite: bool = False) -> Iterator[pathlib.Path]:
    """A folder beside `directory` to write to, which takes its name (and its place) at the end if nothing failed.

    Raises:
      InputError: `directory` holds something already and `overwrite` is not set, or cannot be written.
    """
    directory = pathlib.Path(directory)
    occupied = directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))
    if occupied and not overwrite:
        raise InputError(f"{directory}: exists already")
    beside, old = (directory.parent / f".{directory.name}.{suffix}" for suffix in ("partial", "old"))
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)  # a killed writer's
        beside.mkdir()
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error.strerror})") from None
    try:
        with disk_faults_named(directory):
            yield beside
            if occupied:
                directory.rename(old)
            beside.rename(directory)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def refuse_inside(out: PathLike, *sources: PathLike | None) -> None:
    """Whether writing the folder `out` anew would delete what it is made from.

    Raises:
      InputError: one of `sources` is `out` or lies in it.
    """
    for source in (pathlib.Path(source).resolve() for source in sources if source is not None):
        if pathlib.Path(out).resolve() in (source, *source.parents):
            raise InputError(f"{out}: the source lies there; write to another folder")


def reason(fault: Exception) -> str:
    """Why, in a few words: the system's where it has them."""
    text = getattr(fault, "strerror", None) or str(fault) or type(fault).__name__
    return text.splitlines()[0]


def digest(array: np.ndarray, piece: int = 2**22) -> str:
    """What tells an array's contents from any other's; it is read in pieces, and may lie on the disk."""
    found = hashlib.blake2b(repr((array.shape, str(array.dtype))).encode(), digest_size=16)
    flat = array.reshape(-1)
    for first in range(0, len(flat), piece):
        found.update(np.ascontiguousarray(flat[first : first + piece]).tobytes())
    return found.hexdigest()
