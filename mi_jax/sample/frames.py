"""From latents that come in chunks to frames, with a place that can be kept and taken up again."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

import numpy as np
from jaxtyping import Float, UInt8

from mi_jax.data.features import to_pixels
from mi_jax.models.tiling import Decoder
from mi_jax.sample.stream import Stream


class Latents(Iterator):
    """The chunks of a stream of one video on the host [n h w c], each made on the mesh and handed out without it."""

    def __init__(self, stream: Stream, on_mesh: Callable[[], AbstractContextManager]):
        self.stream, self.on_mesh = stream, on_mesh

    def __next__(self) -> Float[np.ndarray, "n h w c"]:
        with self.on_mesh():
            return np.asarray(next(self.stream))[0]

    def state(self) -> dict[str, np.ndarray]:
        return self.stream.state()

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        with self.on_mesh():
            self.stream.restore(state)


class Frames(Iterator):
    """Frames [n H W 3] of a video, uint8, a few at a time, as soon as they are final.

    `state` between two pieces, and `restore` by one of the same video, go on where it was left.

    latents: in chunks [n h w c] of about unit scale. decoder: of the VAE, whose latents are `scaling` times smaller.
    size: of the pictures, cut from the middle of what is decoded. first, end: the frames that are shown; None: the end
    is not known yet.
    """

    def __init__(
        self,
        latents: Iterator,
        decoder: Decoder,
        scaling: float,
        size: tuple[int, int],
        first: int,
        end: Callable[[], int | None],
    ):
        self.latents, self.decoder, self.scaling, self.size = latents, decoder, np.float32(scaling), size
        self.first, self.end = first, end
        self.seen, self.ended = 0, False
        """Frames decoded; whether there are no more latents."""
        self.pieces: Iterator[np.ndarray] = iter(())

    def __next__(self) -> UInt8[np.ndarray, "n H W 3"]:
        while True:
            for piece in self.pieces:
                start, self.seen = self.seen, self.seen + piece.shape[1]
                end = self.end()
                shown = piece[0, max(0, self.first - start) : None if end is None else max(0, end - start)]
                if len(shown):
                    return self._pixels(shown)
            if self.ended:
                raise StopIteration
            chunk = next(self.latents, None)
            self.ended = chunk is None
            self.pieces = self.decoder.finish() if self.ended else self.decoder.push(chunk[None] / self.scaling)

    def state(self) -> dict[str, np.ndarray]:
        parts = {"sampler": self.latents.state(), "decoder": self.decoder.state()}
        state = {f"{part}/{name}": x for part, arrays in parts.items() for name, x in arrays.items()}
        return state | {"seen": np.asarray(self.seen), "ended": np.asarray(self.ended)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        for part, owner in (("sampler", self.latents), ("decoder", self.decoder)):
            own = {name.partition("/")[2]: x for name, x in state.items() if name.startswith(f"{part}/")}
            owner.restore(own)
        self.seen, self.ended = int(state["seen"]), bool(state["ended"])
        self.pieces = self.decoder.finish() if self.ended else self.decoder.rest()

    def _pixels(self, frames: np.ndarray) -> np.ndarray:
        top, left = ((side - shown) // 2 for side, shown in zip(frames.shape[1:3], self.size, strict=True))
        return to_pixels(frames[:, top : top + self.size[0], left : left + self.size[1]])
