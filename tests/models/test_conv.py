"""The two forms of the causal convolution are the same function with the same gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi_jax.models.conv import causal_conv3d


def inputs(kernel=(3, 3, 3), shape=(2, 5, 6, 8, 3), o=4):
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], shape), jax.random.normal(keys[1], (*kernel, shape[-1], o))


@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3), (3, 3, 3)])
@pytest.mark.parametrize("strides", [(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 2)])
def test_products_equal_the_library_convolution_in_value_and_gradient(kernel, strides):
    x, w = inputs(kernel)

    def value_and_gradients(products, x, w):
        y, pull = jax.vjp(partial(causal_conv3d, strides=strides, products=products), x, w)
        return y, *pull(jnp.cos(y))

    for ours, library in zip(
        jax.jit(partial(value_and_gradients, True))(x, w),
        jax.jit(partial(value_and_gradients, False))(x, w),
        strict=True,
    ):
        np.testing.assert_allclose(ours, library, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("products", [True, False])
def test_a_single_frame_is_padded_with_itself(products):
    x, w = inputs(shape=(1, 1, 4, 4, 3))
    still = jnp.concatenate([x, x, x], axis=1)
    y = causal_conv3d(still, w, products=products)
    np.testing.assert_allclose(causal_conv3d(x, w, products=products), y[:, :1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(y[:, 2:], y[:, :1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("products", [True, False])
def test_no_output_sees_a_later_frame(products):
    x, w = inputs()
    y = causal_conv3d(x, w, products=products)
    later = causal_conv3d(x.at[:, 3:].set(0.0), w, products=products)
    np.testing.assert_allclose(later[:, :3], y[:, :3], atol=1e-5)
    assert float(jnp.abs(later[:, 3:] - y[:, 3:]).min(axis=(2, 3, 4)).max()) > 0
