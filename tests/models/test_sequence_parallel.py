"""Attention spread over eight devices against the same on one, in every reading of eight as ring x ulysses."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mi_jax.errors import InputError
from mi_jax.mesh import make_mesh
from mi_jax.models import attention, sequence_parallel
from mi_jax.models.sequence_parallel import joint_attention, ulysses_degree

B, HEADS, DIM = 2, 8, 4
CHUNK = 16


def streams(n: int, m: int, heads: int = HEADS):
    rng = np.random.default_rng(0)
    normal = lambda length: jnp.asarray(2.0 * rng.normal(size=(B, length, heads, DIM)), jnp.float32)  # noqa: E731
    make = lambda length: tuple(normal(length) for _ in range(3))  # noqa: E731
    return make(n), make(m)


def padded(stream, length: int, value: float):
    """To `length` tokens, with what must not be read."""
    return tuple(jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)), constant_values=value) for x in stream)


def loss(video, text, length, valid, **options):
    """Of valid tokens alone, with a different weight for each."""
    out_v, out_t = joint_attention(video, text, length, **options)
    out_v = jnp.where((jnp.arange(out_v.shape[1]) < valid)[None, :, None, None], out_v, 0.0)
    out_t = jnp.where((jnp.arange(out_t.shape[1])[None] < length[:, None])[..., None, None], out_t, 0.0)
    size = lambda x: math.prod(x.shape[1:])  # noqa: E731
    factors = lambda x: jnp.cos(jnp.arange(size(x), dtype=jnp.float32)).reshape(1, *x.shape[1:])  # noqa: E731
    weigh = lambda x: jnp.sum(jnp.sin(x) * factors(x))  # noqa: E731
    return weigh(out_v) + weigh(out_t), (out_v, out_t)


GRADIENT = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


@pytest.fixture(scope="module", autouse=True)
def short_chunks():
    """Several chunks of queries where few tokens are, as 192 have where many are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_CHUNK", CHUNK)
        yield


@functools.cache
def whole(n: int, m: int, lengths: tuple[int, ...]):
    """Results and gradients on one device."""
    (_, results), gradients = jax.jit(lambda v, t: GRADIENT(v, t, jnp.asarray(lengths, jnp.int32), n))(*streams(n, m))
    return results, gradients


EVEN, PADDED = (24, 8, (8, 8)), (2 * CHUNK + 3, 5, (5, 1))


@pytest.mark.parametrize(
    ("data", "ulysses", "sizes"),
    [
        *((*degrees, PADDED) for degrees in [(1, 8), (1, 4), (1, 2), (1, 1), (2, 4), (2, 2), (2, 1)]),
        *((*degrees, EVEN) for degrees in [(1, 8), (1, 2), (1, 1)]),  # no padding: Ulysses, both, a ring
    ],
)
def test_spread_equals_whole_forwards_and_backwards(data, ulysses, sizes):
    n, m, lengths = sizes
    (video, text), length = streams(n, m), jnp.asarray(lengths, jnp.int32)
    results, expected = whole(n, m, lengths)
    mesh = make_mesh(data=data, seq=8 // data)
    up = lambda size: -(-size // (8 // data)) * (8 // data)  # noqa: E731
    video, text = padded(video, up(n), 50.0), padded(text, up(m), -50.0)
    with jax.set_mesh(mesh):
        place = lambda tree, spec: jax.tree.map(lambda x: jax.device_put(x, spec), tree)  # noqa: E731
        video, text = (place(stream, P("data", "seq")) for stream in (video, text))
        length = place(length, P("data"))
        run = jax.jit(lambda v, t, l: GRADIENT(v, t, l, n, video_length=n, ulysses=ulysses))  # noqa: E741
        (_, spread), got = run(video, text, length)
    for one, other, size in zip(results, spread, (n, m)):
        assert np.linalg.norm(np.asarray(other)[:, :size] - one) < 1e-5 * np.linalg.norm(one)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(got)):
        other, size = np.asarray(other), one.shape[1]
        assert np.linalg.norm(other[:, :size] - one) < 1e-5 * np.linalg.norm(one)
        np.testing.assert_array_equal(other[:, size:], 0)  # padding takes part in nothing


def test_a_kernel_may_make_anything_of_no_keys(monkeypatch):
    """Four tokens on a ring of eight: half of the chunks hold no key, and what fused kernels give for those is NaN."""
    kernel = sequence_parallel.attention_with_lse

    def fused(q, k, v, *, length, **options):
        out, lse = kernel(q, k, v, length=length, **options)
        return jnp.where((length > 0)[:, None, None, None], out, jnp.nan), lse

    (video, text), length = streams(4, 2), jnp.asarray([2, 2], jnp.int32)
    whole, _ = joint_attention(video, text, length)
    monkeypatch.setattr(sequence_parallel, "attention_with_lse", fused)
    with jax.set_mesh(make_mesh(data=1, seq=8)):
        place = lambda stream: tuple(jax.device_put(x, P(None, "seq")) for x in padded(stream, 8, 0.0))  # noqa: E731
        run = jax.jit(lambda v, t: joint_attention(v, t, length, video_length=4, ulysses=1))
        spread, _ = run(place(video), place(text))
    np.testing.assert_allclose(np.asarray(spread)[:, :4], whole, rtol=1e-4, atol=1e-5)


def test_the_degree_is_the_most_that_the_heads_allow():
    assert [ulysses_degree(8, heads) for heads in (24, 4, 3)] == [8, 4, 1]
    assert ulysses_degree(16, 24) == 8
    with pytest.raises(InputError, match=r"24 heads on 16 devices: .* possible are 1, 2, 4, 8"):
        ulysses_degree(16, 24, 16)
