"""The chunked form of attention against the plain formula."""

import importlib.util
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.errors import InputError
from mi_jax.models.attention import QUERY_CHUNK, attention, attention_gradients, attention_with_lse


def plain(q, k, v, length):
    """The formula, which JAX differentiates by itself."""
    logits = jnp.einsum("bnkd,bmkd->bknm", q, k) / np.sqrt(q.shape[-1])
    valid = jnp.arange(k.shape[1])[None, None, None] < length[:, None, None, None]
    return jnp.einsum("bknm,bmkd->bnkd", jax.nn.softmax(jnp.where(valid, logits, -jnp.inf)), v)


def qkv(n, m=None, seed=0):
    shapes = [(2, n, 3, 8)] + [(2, m or n, 3, 8)] * 2
    return [jax.random.normal(k, s) for k, s in zip(jax.random.split(jax.random.key(seed), 3), shapes)]


@pytest.mark.parametrize("n", [7, QUERY_CHUNK, QUERY_CHUNK + 1, 2 * QUERY_CHUNK + 37])
def test_chunked_equals_the_formula(n):
    q, k, v = qkv(n, m=33)
    length = jnp.asarray([33, 5], jnp.int32)
    got = attention(q, k, v, length=length, implementation="xla")
    np.testing.assert_allclose(got, plain(q, k, v, length), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [7, QUERY_CHUNK + 5])
def test_gradients_are_those_of_the_formula(n):
    q, k, v = qkv(n, m=20)
    length = jnp.asarray([20, 13], jnp.int32)
    loss = lambda f: lambda q, k, v: jnp.sum(jnp.sin(f(q, k, v, length=length)))  # noqa: E731
    got = jax.jit(jax.grad(loss(attention), argnums=(0, 1, 2)))(q, k, v)
    expected = jax.jit(jax.grad(loss(plain), argnums=(0, 1, 2)))(q, k, v)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)


def test_padding_is_not_attended_and_no_keys_is_finite():
    q, k, v = qkv(9)
    length = jnp.asarray([4, 0], jnp.int32)
    one = attention(q, k, v, length=length)
    two = attention(q, k.at[:, 4:].set(50.0), v.at[:, 4:].set(-3.0), length=length)
    np.testing.assert_array_equal(one[0], two[0])
    assert np.isfinite(np.asarray(two[1])).all()


def test_parts_over_different_keys_add_up_by_their_denominators():
    """`jax.nn` (here in its XLA form) gives the same denominators, in the layout that is read where cuDNN serves."""
    q, k, v = qkv(QUERY_CHUNK + 9, m=20)
    length = jnp.asarray([20, 13], jnp.int32)
    whole = attention(q, k, v, length=length)
    parts = [attention_with_lse(q, k[:, :8], v[:, :8], length=jnp.asarray([8, 8], jnp.int32)),
             attention_with_lse(q, k[:, 8:], v[:, 8:], length=length - 8)]  # fmt: skip
    total = jnp.logaddexp(parts[0][1], parts[1][1])
    shares = [jnp.moveaxis(jnp.exp(lse - total), 1, 2)[..., None] for _, lse in parts]
    added = sum(share * out for share, (out, _) in zip(shares, parts))
    np.testing.assert_allclose(added, whole, rtol=1e-4, atol=1e-5)
    _, lse = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=length, return_residual=True)
    np.testing.assert_allclose(jnp.moveaxis(lse, 1, 2), total, rtol=1e-4, atol=1e-5)


def test_gradients_by_denominators_are_those_of_the_formula():
    q, k, v = qkv(QUERY_CHUNK + 9, m=20)
    length = jnp.asarray([20, 13], jnp.int32)
    out, pull = jax.vjp(lambda q, k, v: plain(q, k, v, length), q, k, v)
    g = jnp.cos(out)
    delta = jnp.einsum("bnkd,bnkd->bkn", g, out)
    got = attention_gradients(q, k, v, g, attention_with_lse(q, k, v, length=length)[1], delta, length=length)
    chex.assert_trees_all_close(got, pull(g), rtol=1e-4, atol=1e-5)


def cudnn_of_xla(q, k, v, *, key_value_seq_lengths, implementation, return_residual=False):
    """XLA's attention behind what JAX refuses to hand to cuDNN, which is not here: odd lengths, and no key."""
    assert implementation == "cudnn"
    assert q.shape[1] % 2 == 0
    assert k.shape[1] % 2 == 0
    if key_value_seq_lengths is not None:
        assert (np.asarray(key_value_seq_lengths) > 0).all()
    length = key_value_seq_lengths if key_value_seq_lengths is not None else jnp.full(len(k), k.shape[1], jnp.int32)
    out, lse = attention_with_lse(q, k, v, length=length, implementation="xla")
    return (out, jnp.moveaxis(lse, 1, 2)) if return_residual else out


@pytest.mark.parametrize(("n", "m"), [(7, 13), (8, 13), (7, 12), (8, 12)])
@pytest.mark.parametrize("length", [None, (12, 5), (12, 0)])
def test_cudnn_is_given_what_it_takes(monkeypatch, n, m, length):
    """Values, denominators and gradients are those of XLA's form, also of odd lengths and where there is no key."""
    monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn_of_xla)
    q, k, v = qkv(n, m)
    some = np.ones(2, bool) if length is None else np.asarray(length) > 0
    length = None if length is None else jnp.asarray(length, jnp.int32)
    g = jnp.where(some[:, None, None, None], jax.random.normal(jax.random.key(1), q.shape), 0.0)

    def of(kind):
        out, pull = jax.vjp(lambda *x: attention(*x, length=length, implementation=kind), q, k, v)
        return out, *pull(g)

    for got, expected in zip(of("cudnn"), of("xla")):
        assert np.isfinite(got).all()
        np.testing.assert_allclose(np.asarray(got)[some], np.asarray(expected)[some], rtol=1e-5, atol=1e-6)
    if length is not None:
        (out, lse), (wanted, wanted_lse) = (
            attention_with_lse(q, k, v, length=length, implementation=kind) for kind in ("cudnn", "xla")
        )
        np.testing.assert_allclose(np.asarray(out)[some], np.asarray(wanted)[some], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed")
@pytest.mark.parametrize("length", [None, (20, 13), (20, 0)])
def test_tokamax_equals_the_formula_with_its_gradients(length):
    """Denominators, which Tokamax does not give, come from the XLA form."""
    q, k, v = qkv(37, m=20)
    some = slice(None) if length is None else np.asarray(length) > 0
    length = None if length is None else jnp.asarray(length, jnp.int32)

    def of(kind):
        out, pull = jax.vjp(lambda *x: attention(*x, length=length, implementation=kind)[some], q, k, v)
        return out, pull(jnp.cos(out))

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # as Tokamax takes for granted
        found = of("tokamax")
    chex.assert_trees_all_close(found, of("xla"), rtol=1e-4, atol=1e-5)
    if length is not None:
        _, lse = attention_with_lse(q, k, v, length=length, implementation="tokamax")
        np.testing.assert_array_equal(lse, attention_with_lse(q, k, v, length=length, implementation="xla")[1])


def test_without_tokamax_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(InputError, match=r"pip install 'mi-jax\[tokamax\]', on Python 3.12 or newer"):
        attention(*qkv(3), implementation="tokamax")
