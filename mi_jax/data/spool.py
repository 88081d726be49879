"""Samples that arrive one after the other: in memory while they are few, in a file of the temporary folder then."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from jaxtyping import Float32

from mi_jax.data.pieces import pieces
from mi_jax.errors import InputError
from mi_jax.files import reason

IN_MEMORY = 64 * 2**20
"""Bytes beyond which samples lie on the disk: 17 minutes at 16 kHz."""


class Spool:
    """Samples of a sound file: `append` them, then take the `array`. To be used in a `with`, which they outlive.

    The file has no name: the system takes its room back when the last array of it is gone, however a process ends.

    path: of the sound, for messages.

    Raises InputError: the temporary folder is full, or there is none.
    """

    def __init__(self, path: pathlib.Path):
        self.path, self.length = path, 0
        self._memory = bytearray()
        self._file: BinaryIO | None = None
        self._folder: pathlib.Path | None = None

    def __len__(self) -> int:
        return self.length

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # writes what is left in its buffer, which a full disk does not take
                self._file.close()
            self._file = None

    def append(self, samples: Float32[np.ndarray, "..."]) -> None:
        """Adds them, in the order in which they lie."""
        packed = samples.tobytes()
        if self._file is None and len(self._memory) + len(packed) > IN_MEMORY:
            self._folder = temporary_folder(self.path)
            with self._faults_named():
                self._file = tempfile.TemporaryFile()  # noqa: SIM115
                self._file.write(self._memory)
            self._memory = bytearray()
        if self._file is None:
            self._memory += packed
        else:
            with self._faults_named():
                self._file.write(packed)
        self.length += samples.size

    def array(self) -> Float32[np.ndarray, " n"]:
        """All samples: an array in memory or, read only, a `numpy.memmap` of the file."""
        if self._file is None:
            return np.frombuffer(self._memory, np.float32)
        with self._faults_named():
            self._file.flush()
            return np.memmap(self._file, np.float32, mode="r", shape=(self.length,))

    def divide(self, divisor: float) -> None:
        """Divides all samples, where they lie."""
        samples = self.array()
        for part in pieces(len(samples)):
            if self._file is None:
                samples[part] /= divisor
                continue
            with self._faults_named():  # a map that is written to ends the process where the disk is full
                self._file.seek(part.start * samples.itemsize)
                self._file.write((samples[part] / divisor).tobytes())

    def clear(self) -> None:
        """Forgets all samples."""
        self.__exit__()
        self._memory, self.length = bytearray(), 0

    @contextlib.contextmanager
    def _faults_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as fault:
            raise InputError(
                f"{self.path}: its sound cannot be kept in the temporary folder {self._folder} ({reason(fault)}); "
                "TMPDIR names another"
            ) from fault


def temporary_folder(path: pathlib.Path) -> pathlib.Path:
    """Where the sound of `path` lies if it is long. Raises InputError: the system has no such folder."""
    try:
        return pathlib.Path(tempfile.gettempdir())
    except OSError as fault:
        raise InputError(f"{path}: its sound needs a temporary folder ({reason(fault)})") from fault
