"""Long and large videos through the VAE in bounded memory: overlapping tiles in space and time, blended linearly.

The semantics are those of HunyuanVideo's tiled VAE: tiles of `tile_size` pixels and `tile_frames` frames overlap by
`tile_overlap` of a tile; within an overlap the later tile fades in linearly over the earlier one, which ends there. A
temporal tile is one latent frame longer than `tile_frames`, because its first frame plays the part of an image; later
tiles drop it. Two things differ: a video that one tile covers is one tile, and a last tile shorter than the overlap
fades in over the frames at its own place.

A Python loop on the host runs one jitted function per tile shape and keeps results in host memory: device memory is
bounded by one tile, and nothing that is compiled grows with the video. Tiles side by side know nothing of each other,
so where there are several devices each takes one at a time (host memory then holds the tiles of one piece of time).
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from mi_jax.errors import InputError
from mi_jax.models.vae import VAE, VAEConfig


@jax.jit
def _encode(vae: VAE, video):
    return jnp.concatenate(vae.encode(video), axis=-1)


@jax.jit
def _decode(vae: VAE, latents):
    return vae.decode(latents)


def _fade(earlier: np.ndarray, later: np.ndarray, at: int, axis: int) -> np.ndarray:
    """`later`, which begins at entry `at` of `earlier` along an axis, faded in from there to the end of `earlier`."""
    extent = min(earlier.shape[axis] - at, later.shape[axis])
    if extent <= 0:
        return later
    shape = [1] * later.ndim
    shape[axis] = extent
    ramp = (np.arange(extent, dtype=np.float32) / extent).reshape(shape)
    under = np.take(earlier, range(at, at + extent), axis)
    over, rest = np.split(later, [extent], axis)
    return np.concatenate([under * (1 - ramp) + over * ramp, rest], axis)


def _on_devices(run: Callable, vae: VAE, devices: Sequence[jax.Device] | None) -> Callable:
    """`run(vae, tile)` of a list of tiles, in order; on several devices, tiles of one shape at the same time."""
    if not devices or len(devices) == 1:
        return lambda tiles: (np.asarray(run(vae, jnp.asarray(x))) for x in tiles)
    mesh = Mesh(np.array(devices), ("tiles",))
    vae, spread = jax.device_put(vae, NamedSharding(mesh, P())), _spread(run, mesh)

    def run_all(tiles: list[np.ndarray]) -> Iterator[np.ndarray]:
        done, shapes = {}, {}
        for number, tile in enumerate(tiles):
            shapes.setdefault(tile.shape, []).append(number)
        for numbers in shapes.values():
            for first in range(0, len(numbers), len(devices)):
                chosen = numbers[first : first + len(devices)]
                # A device without a tile does the last one again.
                batch = np.stack([tiles[number] for number in chosen + chosen[-1:] * (len(devices) - len(chosen))])
                made = spread(vae, jax.device_put(batch, NamedSharding(mesh, P("tiles"))))
                done |= zip(chosen, np.asarray(made))
        return (done.pop(number) for number in range(len(tiles)))

    return run_all


@functools.lru_cache
def _spread(run: Callable, mesh: Mesh) -> Callable:
    """`run(vae, tile)` of one tile on each device; compiled once for each shape."""
    one = lambda vae, tiles: run(vae, tiles[0])[None]  # noqa: E731
    return jax.jit(jax.shard_map(one, mesh=mesh, in_specs=(P(), P("tiles")), out_specs=P("tiles")))


def _spatial(run: Callable, x: np.ndarray, tile: int, step: int, out_step: int) -> np.ndarray:
    """Runs tiles of x [b t h w c] in height and width: tile and step in entries of x, out_step of the output."""
    if max(x.shape[2:4]) <= tile:
        return next(iter(run([x])))
    rows, above = [], None
    cuts = [(i, j) for i in range(0, x.shape[2], step) for j in range(0, x.shape[3], step)]
    made = iter(run([x[:, :, i : i + tile, j : j + tile] for i, j in cuts]))
    for _ in range(0, x.shape[2], step):
        tiles = [next(made) for _ in range(0, x.shape[3], step)]
        # Each tile fades in over the already faded tiles above and to the left of it.
        for j in range(len(tiles)):
            if above is not None:
                tiles[j] = _fade(above[j], tiles[j], out_step, axis=2)
            if j > 0:
                tiles[j] = _fade(tiles[j - 1], tiles[j], out_step, axis=3)
        rows.append(np.concatenate([y[:, :, :out_step, :out_step] for y in tiles], axis=3))
        above = tiles
    return np.concatenate(rows, axis=2)


class _TimeTiles:
    """Runs overlapping tiles of x [b t h w c], which comes in chunks along time; a tile as soon as it is known whether
    anything follows it.

    tile, step: in entries of x; a tile is one longer. out_step: of the output. causal: nothing of the output depends on
    what follows, so that the last of several tiles may be filled up: one shape serves videos of all lengths. The output
    then goes on beyond the end.
    """

    def __init__(self, run: Callable, tile: int, step: int, out_step: int, causal: bool = False):
        self.run, self.tile, self.step, self.out_step, self.causal = run, tile, step, out_step, causal
        self.number, self.x, self.tail = 0, None, None
        """The tile that comes next, x from its start on, and of the output of the one before what it fades in over."""

    def push(self, chunk: np.ndarray) -> Iterator[np.ndarray]:
        self.x = chunk if self.x is None else np.concatenate([self.x, chunk], axis=1)
        return self.rest()

    def rest(self) -> Iterator[np.ndarray]:
        while self.x is not None and self.x.shape[1] > self.tile + 1:
            yield self._next()

    def finish(self) -> Iterator[np.ndarray]:
        if self.x is None:
            return
        if self.number == 0:  # one tile covers it
            yield self.run(self.x)
            return
        while self.x.shape[1]:
            yield self._next()

    def _next(self) -> np.ndarray:
        cut = self.x[:, : self.tile + 1]
        y = self.run(
            np.pad(cut, [(0, 0), (0, (self.tile + 1 - cut.shape[1]) * self.causal), *[(0, 0)] * 3], mode="edge")
        )
        head, y = y[:, :1], y[:, 1:]
        if self.number == 0:
            done = np.concatenate([head, y[:, : self.out_step]], axis=1)
        else:
            y = _fade(self.tail, y, 0, axis=1)
            done = y[:, : self.out_step]
        self.x, self.tail, self.number = self.x[:, self.step :], y[:, self.out_step :], self.number + 1
        return done


def _steps(c: VAEConfig) -> tuple[int, int, int, int]:
    """Tile and step in pixels, tile and step in frames."""
    size, frames = c.tile_size, c.tile_frames
    # Steps are whole latents.
    step = int(size // c.spatial_stride * (1 - c.tile_overlap)) * c.spatial_stride
    frame_step = int(frames // c.temporal_stride * (1 - c.tile_overlap)) * c.temporal_stride
    if size % c.spatial_stride or frames % c.temporal_stride or min(step, frame_step) < 1:
        raise ValueError(f"tiles of {size} pixels and {frames} frames: no multiples of the VAE's strides, or too small")
    return size, step, frames, frame_step


def encode_tiled(
    vae: VAE, video: Float[Array | np.ndarray, "b f H W 3"], *, devices: Sequence[jax.Device] | None = None
) -> tuple[Float[np.ndarray, "b t h w c"], Float[np.ndarray, "b t h w c"]]:
    """`vae.encode` for any length and size, in host memory; the same numbers where one tile covers the video.

    With `devices`, tiles side by side are encoded at the same time, one on each.

    Raises:
      InputError: height or width is no multiple of the spatial stride, or the frames are not 4k + 1.
    """
    s, st = vae.config.spatial_stride, vae.config.temporal_stride
    _, f, height, width, _ = video.shape
    if height % s or width % s or f % st != 1 % st:
        raise InputError(f"video: {f} frames of {height}x{width} pixels; expected {st}k + 1 frames of multiples of {s}")
    size, step, frames, frame_step = _steps(vae.config)

    run = _on_devices(_encode, vae, devices)

    def tile(x):
        return _spatial(run, x, size, step, step // s)

    tiles = _TimeTiles(tile, frames, frame_step, frame_step // st)
    latents = np.concatenate([*tiles.push(np.asarray(video)), *tiles.finish()], axis=1)
    latents = latents[:, : (f - 1) // st + 1, : height // s, : width // s]
    mean, logvar = np.split(latents, 2, axis=-1)
    return mean, logvar


def decode_pieces(
    vae: VAE, latents: Float[Array | np.ndarray, "b t h w c"], *, devices: Sequence[jax.Device] | None = None
) -> Iterator[Float[np.ndarray, "b n H W 3"]]:
    """Decodes unscaled latents of any length and size, and yields the video's frames in order, a few at a time.

    With `devices`, tiles side by side are decoded at the same time, one on each.
    """
    return decode_stream(vae, [latents], devices=devices)


def decode_stream(
    vae: VAE,
    chunks: Iterable[Float[Array | np.ndarray, "b t h w c"]],
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Iterator[Float[np.ndarray, "b n H W 3"]]:
    """The same of latents that come in `chunks` along time, of a number that need not be known: the same frames, each
    as soon as the tile it is in is there, in memory that does not grow with the video."""
    decoder = Decoder(vae, devices=devices)
    for chunk in chunks:
        yield from decoder.push(chunk)
    yield from decoder.finish()


class Decoder:
    """`decode_stream` with its chunks given one by one, whose place can be kept (`state`) and taken up again."""

    def __init__(self, vae: VAE, *, devices: Sequence[jax.Device] | None = None):
        self.size, self.step, frames, frame_step = _steps(vae.config)
        self.s, self.st = vae.config.spatial_stride, vae.config.temporal_stride
        self.run = _on_devices(_decode, vae, devices)
        causal = vae.config.norm == "rms"
        self.tiles = _TimeTiles(self._tile, frames // self.st, frame_step // self.st, frame_step, causal)
        self.seen, self.given = 0, 0
        """Latent frames taken, and frames given out."""

    def push(self, latents: Float[Array | np.ndarray, "b t h w c"]) -> Iterator[Float[np.ndarray, "b n H W 3"]]:
        """Frames that are known with these latents."""
        self.seen += latents.shape[1]
        return self._given(self.tiles.push(np.asarray(latents)))

    def rest(self) -> Iterator[Float[np.ndarray, "b n H W 3"]]:
        """Frames that `push` has not given yet: after `restore`."""
        return self._given(self.tiles.rest())

    def finish(self) -> Iterator[Float[np.ndarray, "b n H W 3"]]:
        """All others: nothing follows."""
        return self._given(self.tiles.finish())

    def state(self) -> dict[str, np.ndarray]:
        """What `restore` takes; between two pieces of what `push` gives."""
        arrays = {"latents": self.tiles.x, "tail": self.tiles.tail}
        numbers = {"tile": self.tiles.number, "seen": self.seen, "given": self.given}
        return {name: np.asarray(x) for name, x in (arrays | numbers).items() if x is not None}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.tiles.x, self.tiles.tail = state.get("latents"), state.get("tail")
        self.tiles.number, self.seen, self.given = (int(state[name]) for name in ("tile", "seen", "given"))

    def _tile(self, z: np.ndarray) -> np.ndarray:
        return _spatial(self.run, z, self.size // self.s, self.step // self.s, self.step)

    def _given(self, pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for piece in pieces:
            h, w = self.tiles.x.shape[2:4]
            piece = piece[:, : (self.seen - 1) * self.st + 1 - self.given, : h * self.s, : w * self.s]
            self.given += piece.shape[1]
            if piece.shape[1]:
                yield piece


def decode_tiled(vae: VAE, latents: Float[Array | np.ndarray, "b t h w c"]) -> Float[np.ndarray, "b f H W 3"]:
    """`vae.decode` for any length and size, in host memory; the same numbers where one tile covers the video."""
    return np.concatenate(list(decode_pieces(vae, latents)), axis=1)


def encode_latents(vae: VAE, video: Float[Array | np.ndarray, "b f H W 3"]) -> Float[np.ndarray, "b t h w c"]:
    """Latents of about unit scale, the denoiser's data: the tiled mean times the scaling factor."""
    return encode_tiled(vae, video)[0] * np.float32(vae.config.scaling_factor)


def decode_latents(vae: VAE, latents: Float[Array | np.ndarray, "b t h w c"]) -> Float[np.ndarray, "b f H W 3"]:
    """Inverse of `encode_latents`: video around [-1, 1], not clipped."""
    return decode_tiled(vae, latents / np.float32(vae.config.scaling_factor))


def tile_shapes(config: VAEConfig, video: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """(frames, height, width) of every tile that a video of such a shape is encoded in."""
    size, step, frames, frame_step = _steps(config)
    return _tiles(video, (frames + 1, size), (frame_step, step))


def latent_tile_shapes(config: VAEConfig, latents: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """(t, h, w) of every tile that latents of such a shape are decoded in."""
    size, step, frames, frame_step = _steps(config)
    s, st = config.spatial_stride, config.temporal_stride
    return _tiles(latents, (frames // st + 1, size // s), (frame_step // st, step // s))


def _tiles(shape: tuple[int, int, int], tile: tuple[int, int], step: tuple[int, int]) -> list[tuple[int, int, int]]:
    """Tile and step in time, and in space, where either side that exceeds a tile has both cut."""
    tiled = (shape[0] > tile[0], *[max(shape[1:]) > tile[1]] * 2)
    cuts = [
        [min(size, length - i) for i in range(0, length, by)] if cut else [length]
        for length, size, by, cut in zip(shape, (tile[0], *[tile[1]] * 2), (step[0], *[step[1]] * 2), tiled)
    ]
    return list(itertools.product(*cuts))
