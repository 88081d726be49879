"""Sampling a video whose frames are handed out while later ones are still noise: the loop over windows and levels.

`sliding_window` is the law: the same windows, blended in the same way, one Euler step for each frame and level. Here a
host loop takes the passes in one of several orders (`mi_jax.sample.order`), through one jitted step of fixed shape for
videos of every length, and forgets frames that are final. Only `causal` gives another video.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from mi_jax.conditions import Windowed
from mi_jax.diffusion import euler_step
from mi_jax.errors import InputError
from mi_jax.mesh import gather, spread_batch
from mi_jax.sample.guidance import Velocity
from mi_jax.sample.noise import Drawn, GivenNoise
from mi_jax.sample.order import Order, Pass, held_windows, next_group, reach_of
from mi_jax.sample.windows import blend_weights, check_overlap, plan_windows


@runtime_checkable
class Arriving(Windowed, Protocol):
    """Conditions of a video whose length is not known yet: sound that is still being spoken.

    Here `window` may be asked for frames beyond the end: what comes after it, silence.
    """

    def known(self, frames: int | None = None) -> tuple[int, bool]:
        """How many latent frames are known, and whether there will be no more.

        Waits until there are `frames`, or none will follow. None: does not wait.
        """
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Held:
    """The frames under way [b r h w c], each at a level of its own, and the sum of the velocities that it was given
    there. (Shapes stand here, not in the types: JAX rebuilds this tree with tracers and abstract arrays for leaves.)"""

    latents: Any
    total: Any


def stream(
    velocity: Velocity,
    noise: Float[Array | np.ndarray, "b t h w c"] | Drawn,
    sigmas: Float[Array | np.ndarray, "levels"],
    conditions: Windowed | Arriving | None = None,
    *,
    length: int | None = None,
    window: int = 33,
    overlap: int = 8,
    group: int = 1,
    order: Order = "wavefront",
    progress: Callable[[int, int | None], None] | None = None,
) -> "Stream":
    """Latents at the last noise level, in chunks [b n h w c] from first to last, each as soon as it is final.

    With `order` "level" or "wavefront" the chunks together are `sliding_window`'s video, to rounding. By wavefront the
    first comes after some levels^2 / 2 passes through the network, and memory does not grow with the video.

    On a mesh, call it (and `next`) under `jax.set_mesh`; see `sliding_window` for how a group is spread.

    Args:
      velocity: see `sliding_window`. Arrays of a pytree (a module, `jax.tree_util.Partial`) are arguments of the jitted
        step; those that a plain function closes over become constants in it.
      noise: of the whole video; or drawn where it is asked for (`FrameNoise`), and then `length` says how many frames
        there are, or `conditions` do.
      conditions: of the whole video; or `Arriving`, of a length that is not known yet.
      length: latent frames.
      group: passes on the network at a time.
      progress: called with (passes done, passes of the whole video or None) before the first group and after each.

    Raises:
      InputError: an overlap that cannot be blended; no length; an unknown order; "level" without a length.
    """
    check_overlap(window, overlap)
    if order not in ("level", "wavefront", "causal"):
        raise InputError(f"order is {order!r}, none of level, wavefront, causal")
    if not isinstance(noise, Drawn):
        length = noise.shape[1] if length is None else length
        noise = GivenNoise(noise)
    arriving = conditions if length is None and isinstance(conditions, Arriving) else None
    if arriving is None and length is None:
        raise InputError("no length: give noise of a whole video, or `length`, or conditions that say when they end")
    velocity = velocity if _has_arrays(velocity) else jax.tree_util.Partial(velocity)
    sigmas = np.asarray(sigmas, np.float32)
    grid = Grid(window, overlap, order, length)
    if arriving is not None:
        grid.extend(*arriving.known())
        if order == "level" and not grid.ended:
            raise InputError('order "level" needs the length of the video before it begins')
    return Stream(velocity, noise, sigmas, conditions, grid, arriving, group, progress)


class Stream(Iterator):
    """The chunks of `stream`. Between two of them the place can be kept (`state`), and taken up again by a stream of
    the same arguments (`restore`)."""

    def __init__(self, velocity, noise, sigmas, conditions, grid: "Grid", arriving, group: int, progress):
        self.velocity, self.noise, self.sigmas, self.conditions = velocity, noise, sigmas, conditions
        self.grid, self.arriving, self.group, self.progress = grid, arriving, group, progress
        self.levels = len(sigmas) - 1
        self.first, self.done = 0, []
        """The earliest window that is not done; levels passed by it and by those after it that may begin."""
        self.emitted, self.passes, self.held, self.told = 0, 0, None, {}
        self._say()

    def __next__(self) -> Float[Array, "b n h w c"]:
        while True:
            while self.done and self.done[0] == self.levels:
                chunk = self._finish_first()
                if chunk is not None:
                    return chunk
            group = self._next_group()
            if not group:
                raise StopIteration
            self._advance(group)

    def state(self) -> dict[str, np.ndarray]:
        """What `restore` takes."""
        numbers = {"first": self.first, "done": self.done, "emitted": self.emitted, "passes": self.passes}
        held = {} if self.held is None else {"latents": self.held.latents, "total": self.held.total}
        return {name: np.asarray(x) for name, x in (numbers | held).items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.first, self.emitted, self.passes = (int(state[name]) for name in ("first", "emitted", "passes"))
        self.done = [int(level) for level in state["done"]]
        if "latents" in state:
            self._hold()  # as the programs give it
            self.held = Held(_like(self.held.latents, state["latents"]), _like(self.held.total, state["total"]))
        for window, level in enumerate(self.done, self.first):
            if 0 < level < self.levels:
                self._tell(window)
        self._say()

    def _next_group(self) -> list[Pass]:
        grid, arriving = self.grid, self.arriving
        for wait in (False, True):  # for what is still to come, only when there is nothing else to do
            if arriving is not None and not grid.ended:
                grid.extend(*arriving.known(grid.needed(self.first + len(self.done)) if wait else None))
            self.done += [0] * (grid.admitted - self.first - len(self.done))
            group = next_group(
                self.done, self.first, grid.ended,
                order=grid.order, levels=self.levels, reach=grid.reach, group=self.group,
            )  # fmt: skip
            if group or arriving is None or grid.ended:
                break
        return group

    def _advance(self, group: list[Pass]) -> None:
        grid, base = self.grid, self.grid.starts[self.first]
        if self.held is None:
            self._hold()
        for pass_ in group:
            if pass_.level == 0:
                start = grid.starts[pass_.window]
                self._tell(pass_.window)
                noise = self.noise.window(start, grid.window)
                self.held = begin(self.held, noise, np.int32(start - base), *grid.fresh(pass_.window))
        # A group that is not full takes its last pass again, of no weight.
        filled = group + group[-1:] * (self.group - len(group))
        plans = [grid.plan(pass_.window) for pass_ in filled]
        weights, finished, pinned = (np.stack(part) for part in zip(*plans, strict=True))
        weights[len(group) :], finished[len(group) :] = 0, False
        at = np.array([grid.starts[pass_.window] - base for pass_ in filled], np.int32)
        steps = np.stack([self.sigmas[pass_.level : pass_.level + 2] for pass_ in filled])
        told = None if self.conditions is None else [self.told[pass_.window] for pass_ in filled]
        self.held = advance(self.velocity, self.held, at, weights, finished, pinned, steps, told)
        for pass_ in group:
            self.done[pass_.window - self.first] += 1
        self.passes += len(group)
        if self.progress is not None:
            jax.block_until_ready(self.held)
            self._say()

    def _finish_first(self) -> Array | None:
        """What is final now that the first window is done, which is forgotten."""
        grid = self.grid
        base, final, chunk = grid.starts[self.first], grid.final(self.first), None
        if final > self.emitted:
            chunk = _taken(self.held, np.int32(self.emitted - base), final - self.emitted)
            self.emitted = final
        self.told.pop(self.first, None)
        self.done.pop(0)
        self.first += 1
        if self.first < len(grid.starts):
            self.held = forget(self.held, np.int32(grid.starts[self.first] - base))
        return chunk

    def _hold(self) -> None:
        frames = self.grid.held_frames(held_windows(self.grid.order, self.levels, self.grid.reach, self.group))
        self.held = _empty(self.noise.window(0, 1), frames)

    def _tell(self, window: int) -> None:
        if self.conditions is not None:
            self.told[window] = self.conditions.window(self.grid.starts[window], self.grid.window)

    def _say(self) -> None:
        if self.progress is not None:
            self.progress(self.passes, self.grid.passes(self.levels))


def _like(x: Array, saved: np.ndarray) -> Array:
    """What was kept, where `x` is; of another group of passes it may hold more frames, or fewer."""
    saved = np.pad(saved, [(0, max(0, x.shape[i] - saved.shape[i]) if i == 1 else 0) for i in range(saved.ndim)])
    return jax.device_put(saved.astype(x.dtype), x.sharding)


class Grid:
    """Where windows lie, and what each does to its frames, for a video whose length may not be known yet. Then they
    share `overlap` exactly, and the last may reach beyond the end."""

    def __init__(self, window: int, overlap: int, order: Order, length: int | None = None):
        self.window, self.step, self.order = window, window - overlap, order
        self.ended, self.length, self.frames = length is not None, length, length or 0
        self.starts = [0]
        """Of windows that are known to be."""
        if length is not None:
            self.window = min(window, length)
            self.starts = [int(start) for start in plan_windows(length, window, overlap)]
        self.reach = reach_of(self.starts, self.window) if self.ended else (window - 1) // self.step

    def passes(self, levels: int) -> int | None:
        """Through the network, of the whole video, once its length is known."""
        return len(self.starts) * levels if self.ended else None

    def extend(self, frames: int, ended: bool) -> None:
        """So many latent frames are known; `ended`: they are all."""
        if ended and frames < 1:
            raise InputError("conditions end before their first frame")
        self.frames, self.ended = frames, ended
        while frames > self.starts[-1] + self.window:  # what comes after it is another window's
            self.starts.append(self.starts[-1] + self.step)
        if ended:
            self.length = frames
            self.window = min(self.window, frames)

    def needed(self, window: int) -> int:
        """How many frames must be known for a window to begin: its own and, where windows are blended, enough to know
        whether all those are there that share frames with it."""
        if self.order == "causal":
            return window * self.step + self.window
        return (window + self.reach - 1) * self.step + self.window + 1

    @property
    def admitted(self) -> int:
        """Windows that may begin."""
        if self.ended:
            return len(self.starts)
        return max(0, (self.frames - self.needed(0)) // self.step + 1)

    def held_frames(self, windows: int | None) -> int:
        """Frames that so many successive windows span at most, or (None) all; the same for videos of all lengths that
        are more than one window."""
        if windows is None or (self.ended and len(self.starts) == 1):
            return self.starts[-1] + self.window
        return (windows - 1) * self.step + self.window

    def shared(self, window: int) -> int:
        """Frames that a window shares with the one before it."""
        return self.starts[window - 1] + self.window - self.starts[window] if window else 0

    def fresh(self, window: int) -> tuple[Bool[np.ndarray, " w"], Bool[np.ndarray, " w"]]:
        """Of a window's frames, which are new, and which it takes over from the one before as they are."""
        new = np.arange(self.window) >= self.shared(window)
        return new, ~new & (self.order == "causal")

    def plan(self, window: int) -> tuple[Float[np.ndarray, " w"], Bool[np.ndarray, " w"], Bool[np.ndarray, " w"]]:
        """What a window weighs at each of its frames, which of them it is the last to see at a level, and which it only
        looks at."""
        new, pinned = self.fresh(window)
        if self.order == "causal":
            return new.astype(np.float32), np.ones(self.window, bool), pinned
        near = self.starts[max(0, window - self.reach) : window + self.reach + 1]
        near, own = np.array(near) - near[0], min(window, self.reach)
        weights = blend_weights(near, self.window, int(near[-1]) + self.window)[own]
        return weights, np.arange(self.window) < self._last_seen(window) - self.starts[window], pinned

    def final(self, window: int) -> int:
        """The frame before which all are final once a window and those before it have passed all levels."""
        end = self._last_seen(window)
        return end if self.length is None else min(end, self.length)

    def _last_seen(self, window: int) -> int:
        """The frame before which no later window sees any."""
        if self.order != "causal" and window + 1 < len(self.starts):
            return self.starts[window + 1]
        return self.starts[window] + self.window


@partial(jax.jit, static_argnames="frames")
def _empty(like: Array, frames: int) -> Held:
    shape = (like.shape[0], frames, *like.shape[2:])
    wide = like.dtype if like.dtype.itemsize >= 4 else jnp.float32
    return Held(jnp.zeros(shape, like.dtype), jnp.zeros(shape, wide))


@partial(jax.jit, static_argnames="frames")
def _taken(held: Held, at: Array, frames: int) -> Array:
    """Some of the frames, in memory of their own: those held are given away with the next pass."""
    return jax.lax.dynamic_slice_in_dim(held.latents, at, frames, axis=1)


@partial(jax.jit, donate_argnames="held")
def begin(held: Held, noise: Array, at: Array, new: Bool[Array, "w"], pinned: Bool[Array, "w"]) -> Held:
    """Noise at a window's new frames; it begins at frame `at` of those held.

    `pinned` frames are final already. They go back to noise, too, and have the velocity that leads from there to what
    they are, at every level.
    """
    cut = partial(jax.lax.dynamic_slice_in_dim, start_index=at, slice_size=noise.shape[1], axis=1)
    put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=at, axis=1)
    new, pinned = _along_frames(new), _along_frames(pinned)
    latents, total = cut(held.latents), cut(held.total)
    away = noise.astype(total.dtype) - latents.astype(total.dtype)
    total = jnp.where(pinned, away, jnp.where(new, 0, total))
    return Held(put(held.latents, jnp.where(new | pinned, noise, latents)), put(held.total, total))


@partial(jax.jit, donate_argnames="held")
def forget(held: Held, frames: Array) -> Held:
    """Without the first `frames`; what follows moves up."""

    def move(x):
        return jax.lax.dynamic_slice_in_dim(jnp.concatenate([x, jnp.zeros_like(x)], axis=1), frames, x.shape[1], axis=1)

    return jax.tree.map(move, held)


@partial(jax.jit, donate_argnames="held")
def advance(
    velocity: Velocity,
    held: Held,
    at: Int[Array, "g"],
    weights: Float[Array, "g w"],
    finished: Bool[Array, "g w"],
    pinned: Bool[Array, "g w"],
    steps: Float[Array, "g 2"],
    conditions: list[Windowed] | None,
) -> Held:
    """One group of passes, the jitted program that sampling repeats, the same for videos of all lengths.

    Args:
      at: where the windows begin among the frames held.
      weights, finished, pinned: `Grid.plan` of each.
      steps: each window's level of noise, and the next.
      conditions: of each window.
    """
    b, length = held.latents.shape[0], weights.shape[1]
    cut = lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, length, axis=1)  # noqa: E731
    windows = rearrange(jax.vmap(partial(cut, held.latents))(at), "g b t h w c -> (g b) t h w c")
    parts = None if conditions is None else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *conditions)
    windows, parts, sigma = spread_batch((windows, parts, jnp.repeat(steps[:, 0], b)))
    u = gather(velocity(windows, sigma, parts))
    u = rearrange(u.astype(held.total.dtype), "(g b) t h w c -> g b t h w c", b=b)

    # One after the other, not as a scatter: the order of a sum decides its last bit.
    def blend(held, pass_):
        at, weight, finished, pinned, step, u = pass_
        latents, total = cut(held.latents, at), cut(held.total, at) + _along_frames(weight) * u
        finished, pinned = _along_frames(finished), _along_frames(pinned)
        moved = euler_step(latents.astype(total.dtype), total, step[0], step[1]).astype(latents.dtype)
        put = lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, at, axis=1)  # noqa: E731
        return Held(
            put(held.latents, jnp.where(finished, moved, latents)),
            put(held.total, jnp.where(finished & ~pinned, 0, total)),
        ), None

    return jax.lax.scan(blend, held, (at, weights, finished, pinned, steps, u))[0]


def _along_frames(x: Array) -> Array:
    return x.reshape(1, -1, 1, 1, 1)


def _has_arrays(velocity: Any) -> bool:
    return all(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(velocity))
