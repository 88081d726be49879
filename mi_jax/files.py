"""Files and folders that are asked for by name, and that appear under their name only when they are whole."""

import contextlib
import errno
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from mi_jax.errors import InputError

PathLike = str | os.PathLike
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
"""Full disk, full quota, a file beyond its limit, and disks that fail: no fault of the program."""


def existing_file(path: PathLike, what: str) -> pathlib.Path:
    """`path` as a Path; raises InputError when there is no such file. `what` names its role in the message."""
    path = pathlib.Path(path)
    if path.is_dir():
        raise InputError(f"{path}: {what} is a folder, a file is needed")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: {what} is a pipe or a device, a file is needed")
    if not path.is_file():
        raise InputError(f"{path}: {what} not found")
    return path


def check_writable(path: PathLike) -> pathlib.Path:
    """`path` as a Path; raises InputError unless a file can be created (or replaced) there. Leaves nothing behind."""
    path = pathlib.Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder, a file name is needed")
    if not path.parent.is_dir():
        raise InputError(f"{path}: output folder {path.parent} does not exist")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".writable"):
            pass
    except OSError as fault:
        raise InputError(f"{path}: output folder {path.parent} is not writable ({reason(fault)})") from fault
    return path


@contextlib.contextmanager
def written_beside(path: PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary name in the folder of `path`; renames it to `path` on success, removes it on any error.

    Raises:
      InputError: no file can be written there, or not all of it (a full disk).
    """
    path = check_writable(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as fault:
        if fault.errno in DISK_FAULTS:
            raise InputError(f"{path}: cannot be written ({reason(fault)})") from fault
        raise
    finally:
        partial.unlink(missing_ok=True)


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
