"""The streaming sampler: the same video as `sliding_window`'s, whatever the order, in memory that does not grow."""

import dataclasses
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_sampling import SIGMAS, C, H, W, entangled, gaussian, noise, told

from mi_jax.conditions import Conditions
from mi_jax.diffusion import add_noise
from mi_jax.errors import InputError
from mi_jax.mesh import make_mesh
from mi_jax.sample import stream as stream_module
from mi_jax.sample.guidance import Guidance
from mi_jax.sample.noise import FrameNoise
from mi_jax.sample.order import held_windows
from mi_jax.sample.sliding_window import sliding_window
from mi_jax.sample.stream import Arriving, stream
from mi_jax.sample.windows import grid_length

SMALL = {"window": 9, "overlap": 4}


def joined(*args, **options) -> np.ndarray:
    return np.concatenate(list(stream(*args, **options)), axis=1)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("order", ["level", "wavefront"])
@pytest.mark.parametrize(("length", "overlap"), [(34, 4), (31, 4), (23, 7), (9, 4), (5, 3)])
def test_every_order_gives_the_video_of_the_law(length, overlap, order, group):
    options = {"window": 9, "overlap": overlap}
    expected = sliding_window(entangled, noise(length, 2), SIGMAS, told(length, 2), **options)
    made = joined(entangled, noise(length, 2), SIGMAS, told(length, 2), order=order, group=group, **options)
    np.testing.assert_allclose(made, expected, atol=2e-6)


def test_one_program_serves_all_lengths_and_the_noise_of_a_frame_is_its_own():
    drawn = FrameNoise(jax.random.key(0), (1, H, W, C))
    programs = (stream_module.advance, stream_module.begin, stream_module.forget)
    made = {}
    for length in (44, 64, 89):
        before = [program._cache_size() for program in programs]
        made[length] = joined(entangled, drawn, SIGMAS, told(length), length=length, **SMALL)
        if length > 44:
            assert [program._cache_size() for program in programs] == before
        whole = drawn.window(0, length)
        np.testing.assert_allclose(
            made[length], sliding_window(entangled, whole, SIGMAS, told(length), **SMALL), atol=2e-6
        )
    assert np.asarray(whole).std() == pytest.approx(1, abs=0.05)
    assert len(np.unique(np.asarray(whole))) == whole.size


@pytest.mark.parametrize("windows", [8, 24])
@pytest.mark.parametrize("order", ["level", "wavefront"])
def test_the_first_frames_come_early_and_memory_does_not_grow(windows, order):
    """By wavefront after 1 + 2 + 3 + 4 passes of 4 levels, whatever the length; by level after all but the last row."""
    seen, length = [], 4 + 5 * windows
    told_of = lambda done, total: seen.append((done, total))  # noqa: E731
    next(stream(entangled, noise(length), SIGMAS, told(length), order=order, progress=told_of, **SMALL))
    assert seen[-1] == ({"wavefront": 10, "level": 3 * windows + 1}[order], 4 * windows)
    at_once = held_windows(order, 4, 1, 1)
    held = stream_module.Grid(9, 4, order, length).held_frames(at_once)
    assert held == {"wavefront": 9 + 3 * 5, "level": length}[order]


@dataclasses.dataclass
class Spoken:
    """Conditions of `length` frames that arrive a few at a time; what comes after them is silence."""

    whole: Conditions
    length: int
    rate: int
    heard: int = 0
    waits: int = 0

    def known(self, frames=None):
        if frames is None:
            self.heard = min(self.length, self.heard + self.rate)
        else:
            self.waits += 1
            self.heard = min(self.length, max(frames, self.heard))
        return self.heard, self.heard == self.length

    def window(self, start, length):
        assert start + 1 <= self.heard
        return self.whole.window(start, length)


@pytest.mark.parametrize("length", [1, 6, 9, 10, 30, 34, 43])
@pytest.mark.parametrize(("rate", "group"), [(0, 1), (2, 2), (100, 1)])
def test_of_sound_that_is_still_arriving_it_is_the_same_video(length, rate, group):
    """As of a video whose end is known, silence filled up to a whole number of windows."""
    drawn, grid = FrameNoise(jax.random.key(3), (1, H, W, C)), grid_length(length, 9, 4)
    whole = told(grid)
    spoken = Spoken(whole, length, rate)
    assert isinstance(spoken, Arriving)
    made = joined(entangled, drawn, SIGMAS, spoken, group=group, **SMALL)
    expected = sliding_window(entangled, drawn.window(0, grid), SIGMAS, whole, **SMALL)[:, :length]
    np.testing.assert_allclose(made, expected, atol=2e-6)


def test_it_waits_for_no_more_sound_than_the_first_frames_need():
    """4 windows, and one frame more, which says that there is another window."""
    spoken = Spoken(told(124), 124, 0)
    next(stream(entangled, FrameNoise(jax.random.key(0), (1, H, W, C)), SIGMAS, spoken, **SMALL))
    assert spoken.heard == 9 + 5 * 3 + 1
    spoken = Spoken(told(124), 124, 0)
    next(stream(entangled, FrameNoise(jax.random.key(0), (1, H, W, C)), SIGMAS, spoken, order="causal", **SMALL))
    assert spoken.heard == 9


def test_causal_windows_end_before_the_next_begins_which_keeps_what_they_share():
    """By hand: each window from noise to data, the frames shared with the one before held to it at every level."""
    length, x, conditions = 24, noise(24), told(24)
    expected = np.zeros(x.shape, np.float32)
    for start in (0, 5, 10, 15):
        shared = 4 if start else 0
        own = x[:, start : start + 9]
        final = jnp.asarray(expected[:, start : start + shared])
        latents = own
        for sigma, sigma_next in pairwise(SIGMAS):
            latents = latents.at[:, :shared].set(add_noise(final, own[:, :shared], sigma))
            u = entangled(latents, jnp.full(1, sigma), conditions.window(start, 9))
            latents = latents + (sigma_next - sigma) * u
        expected[:, start + shared : start + 9] = latents[:, shared:]
    chunks = list(stream(entangled, x, SIGMAS, conditions, order="causal", **SMALL))
    assert [chunk.shape[1] for chunk in chunks] == [9, 5, 5, 5]
    np.testing.assert_allclose(np.concatenate(chunks, axis=1), expected, atol=5e-6)
    assert length == sum(chunk.shape[1] for chunk in chunks)


@pytest.mark.parametrize(("group", "guidance"), [(4, Guidance()), (8, Guidance(audio=2.0, text=1.0))])
def test_on_eight_devices_it_is_the_same_video(group, guidance):
    layouts = []

    def velocity(latents, sigma, conditions):
        layouts.append(jax.typeof(latents).sharding.spec[0])
        return entangled(latents, sigma, conditions)

    expected = joined(guidance(velocity), noise(44), SIGMAS, told(44), group=group, **SMALL)
    with jax.set_mesh(make_mesh(data=4, seq=2)):
        made = joined(guidance(velocity), noise(44), SIGMAS, told(44), group=group, **SMALL)
    np.testing.assert_allclose(made, expected, atol=1e-5)
    assert layouts == [None, "data"]  # one program each


@pytest.mark.parametrize("order", ["wavefront", "causal"])
def test_a_stream_is_taken_up_where_it_was_left(order):
    make = lambda: stream(entangled, noise(64), SIGMAS, told(64), order=order, group=2, **SMALL)  # noqa: E731
    whole = list(make())
    for left in (0, 1, 5, len(whole)):
        before, after = make(), make()
        chunks = [next(before) for _ in range(left)]
        state = before.state()
        assert all(isinstance(x, np.ndarray) for x in state.values())
        after.restore(state)
        chunks += list(after)
        np.testing.assert_array_equal(np.concatenate(chunks, axis=1), np.concatenate(whole, axis=1))


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 3)])
def test_a_stream_is_taken_up_with_another_number_of_passes_at_a_time(before, after):
    """As on a machine of other devices: what is held then has another size."""
    make = lambda group: stream(entangled, noise(84), SIGMAS, told(84), group=group, **SMALL)  # noqa: E731
    whole, first, then = list(make(1)), make(before), make(after)
    chunks = [next(first) for _ in range(5)]
    then.restore(first.state())
    made = np.concatenate([*chunks, *then], axis=1)
    np.testing.assert_allclose(made, np.concatenate(whole, axis=1), atol=2e-6)


def test_weights_of_a_velocity_are_arguments_of_the_program():
    scaled = lambda scale, latents, sigma, conditions: scale * entangled(latents, sigma, conditions)  # noqa: E731
    run = lambda scale: joined(  # noqa: E731
        jax.tree_util.Partial(scaled, jnp.float32(scale)), noise(24), SIGMAS, told(24), **SMALL
    )
    one = run(1.0)
    before = stream_module.advance._cache_size()
    assert np.abs(run(0.5) - one).max() > 0.1
    assert stream_module.advance._cache_size() == before


def test_latents_in_bf16_and_no_conditions():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, 15, 8, 8, 4)), jnp.bfloat16)
    made = list(stream(gaussian, x, SIGMAS, window=7, overlap=3))
    assert {chunk.dtype for chunk in made} == {jnp.dtype("bfloat16")}
    law = jax.jit(partial(sliding_window, gaussian, window=7, overlap=3))(x, SIGMAS)
    difference = np.abs(np.concatenate(made, 1).astype(np.float32) - np.asarray(law, np.float32))
    assert difference.max() < 0.05


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"overlap": 2}, "overlap of 2"),
        ({"overlap": 9}, "overlap of 9"),
        ({"noise": FrameNoise(jax.random.key(0), (1, H, W, C))}, "no length"),
    ],
)
def test_what_cannot_be_streamed_is_said_at_once(options, fault):
    call = {"noise": noise(20), "sigmas": SIGMAS, "conditions": told(20)} | SMALL | options
    with pytest.raises(InputError, match=fault):
        stream(entangled, **call)


def test_sound_that_ends_before_its_first_frame():
    with pytest.raises(InputError, match="end before their first frame"):
        joined(entangled, FrameNoise(jax.random.key(0), (1, H, W, C)), SIGMAS, Spoken(told(9), 0, 0), **SMALL)
