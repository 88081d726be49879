"""Products that round their operands, and vectors at every token."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mi_jax.mesh import make_mesh
from mi_jax.models.layers import linear, matmul, per_token


def rounded(x) -> np.ndarray:
    return np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)


@pytest.fixture(scope="module")
def operands():
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, ((8, 5, 32), (32, 12), (8, 5, 12))))


def product_and_gradients(x, kernel, g):
    def product(x, kernel, g):
        out, pull = jax.vjp(matmul, x, kernel)
        return out, *pull(g)

    return jax.jit(product)(x, kernel, g)


def test_by_default_products_are_exact(operands):
    x, kernel, g = (np.asarray(a, np.float64) for a in operands)
    out, dx, dkernel = product_and_gradients(*operands)
    np.testing.assert_allclose(out, x @ kernel, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx, g @ kernel.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dkernel, np.einsum("bnd,bne->de", x, g), rtol=1e-4, atol=1e-4)


def test_at_bfloat16_operands_are_rounded_and_sums_are_f32_backwards_too(operands):
    x, kernel, g = map(rounded, operands)
    with jax.default_matmul_precision("bfloat16"):
        out, dx, dkernel = product_and_gradients(*operands)
    assert out.dtype == dx.dtype == dkernel.dtype == jnp.float32
    np.testing.assert_allclose(out, x @ kernel, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dx, g @ kernel.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dkernel, np.einsum("bnd,bne->de", x, g), rtol=1e-4, atol=1e-4)
    assert np.abs(out - np.asarray(operands[0]) @ np.asarray(operands[1])).max() > 1e-3  # the setting was heard


def test_a_spread_batch_gives_the_same_gradients(operands):
    mesh = make_mesh(data=8)
    with jax.default_matmul_precision("bfloat16"):
        alone = product_and_gradients(*operands)
        with jax.set_mesh(mesh):
            spread = [jax.device_put(a, P("data") if a.ndim == 3 else P()) for a in operands]
            together = product_and_gradients(*spread)
    chex.assert_trees_all_close(together, alone, rtol=1e-4, atol=1e-4)


def test_linear_layers_follow_and_half_precision_is_left_alone(operands):
    layer = linear(32, 12, rngs=nnx.Rngs(0))
    x = operands[0]
    exact = layer(x)
    with jax.default_matmul_precision("bfloat16"):
        low, half = layer(x), matmul(x.astype(jnp.bfloat16), layer.kernel[...].astype(jnp.bfloat16))
    assert 1e-3 < np.abs(exact - low).max() < 0.1
    assert half.dtype == jnp.bfloat16


def test_a_vector_at_every_token_has_the_gradient_of_a_broadcast():
    x, g = (jax.random.normal(jax.random.key(i), (2, 7, 5)) for i in range(2))
    vector = jax.random.normal(jax.random.key(2), (2, 1, 5))
    made, pull = jax.vjp(lambda vector: per_token(vector, x), vector)
    expected, plain = jax.vjp(lambda vector: jnp.broadcast_to(vector, x.shape), vector)
    np.testing.assert_array_equal(made, expected)
    np.testing.assert_allclose(pull(g)[0], plain(g)[0], rtol=1e-6)
    each, pull = jax.vjp(lambda vectors: per_token(vectors, x), g)  # one of its own at every token
    np.testing.assert_array_equal(each, g)
    np.testing.assert_array_equal(pull(x)[0], x)


def test_the_gradient_of_a_bias_is_summed_in_f32():
    """15,000 tokens in bf16: a sum in bf16 stops at 256 times what is added."""
    layer = linear(4, 8, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.arange(8.0)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layer)
    x = jnp.ones((1, 15_000, 4), jnp.bfloat16)
    gradient = jax.grad(lambda layer: jnp.sum(layer(x).astype(jnp.float32)))(half)
    np.testing.assert_array_equal(gradient.bias[...].astype(jnp.float32), np.float32(jnp.bfloat16(15_000)))
    x = jax.random.normal(jax.random.key(0), (2, 5, 4))
    y, pull = jax.vjp(lambda layer, x: layer(x), layer, x)
    np.testing.assert_allclose(y, np.asarray(x @ layer.kernel[...]) + np.arange(8.0), rtol=1e-6, atol=1e-6)
    g = jax.random.normal(jax.random.key(1), y.shape)
    of_layer, of_x = pull(g)
    np.testing.assert_allclose(of_layer.bias[...], g.sum((0, 1)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_x, g @ layer.kernel[...].T, rtol=1e-5, atol=1e-5)
