"""What a speaker says, and when: several sounds on one time line."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32

from mi_jax.errors import InputError
from mi_jax.rates import SAMPLE_RATE


@dataclasses.dataclass(frozen=True)
class Utterances:
    """Sounds of one speaker, silence between them.

    starts: samples from the start of the video to each. sounds: each [n], in memory or on the disk.

    Raises:
      InputError: one begins before the start, or before the one before it has ended; there is none.
    """

    name: str
    starts: tuple[int, ...]
    sounds: tuple[Float32[np.ndarray, "_"], ...]

    def __post_init__(self):
        end = 0
        if not self.sounds:
            raise InputError(f"{self.name}: nothing is said")
        for number, (start, sound) in enumerate(self, 1):
            if start < end:
                last = (
                    f"before sound {number - 1} has ended, at {end / SAMPLE_RATE:.2f} s" if number > 1 else "before 0"
                )
                raise InputError(f"{self.name}: sound {number} begins at {start / SAMPLE_RATE:.2f} s, {last}")
            end = start + len(sound)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return zip(self.starts, self.sounds, strict=True)

    def __len__(self) -> int:
        """Samples to the end of the last."""
        return self.starts[-1] + len(self.sounds[-1])

    def until(self, samples: int) -> "Utterances":
        """What is said before that; of the first a little in any case."""
        kept = [(start, sound[: max(samples - start, 1)]) for start, sound in self if start < samples]
        kept = kept or [(0, self.sounds[0][:1])]
        return Utterances(self.name, *map(tuple, zip(*kept, strict=True)))
