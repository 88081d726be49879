"""The sound of a video: voices that are mixed where they are read."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from mi_jax.data.pieces import peak


class SoundTrack:
    """The sum of voices over `length` samples, [n] or [n 2]: a slice of it is computed when it is asked for.

    Scaled down as a whole where several would clip together. In stereo if one of them is; silent behind a voice's end.

    voices: each [n], [n 1] or [n 2], in memory or on the disk. starts: samples to where each begins, by default 0.
    """

    def __init__(self, voices: Sequence[np.ndarray], length: int, starts: Sequence[int] | None = None):
        self._starts = [0] * len(voices) if starts is None else list(starts)
        self._voices = [voice[:, None] if voice.ndim == 1 else voice for voice in voices]
        self._channels = max(voice.shape[1] for voice in self._voices)
        self._length, self._divisor = length, 1.0
        if len(voices) > 1:
            self._divisor = max(1.0, peak(self))

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._length,) if self._channels == 1 else (self._length, self._channels)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> Float32[np.ndarray, " n"] | Float32[np.ndarray, "n 2"]:
        """Samples one after the other. Raises ValueError for a slice that leaves some out."""
        start, stop, step = part.indices(self._length)
        if step != 1:
            raise ValueError(f"a sound is read sample by sample, not in steps of {step}")
        total = np.zeros((max(0, stop - start), self._channels), np.float32)
        for begin, voice in zip(self._starts, self._voices, strict=True):
            first, last = max(start, begin), min(stop, begin + len(voice))
            if first < last:
                total[first - start : last - start] += voice[first - begin : last - begin]
        total /= self._divisor
        return total[:, 0] if self._channels == 1 else total
