"""Low-rank factors beside frozen kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_dit import conditions, latents_and_sigma, random_dit
from tiny_records import TINY

from mi_jax.mesh import make_mesh, parameter_spec, shard_parameters
from mi_jax.models import lora
from mi_jax.models.layers import linear


@pytest.fixture(scope="module")
def params():
    return nnx.state(random_dit(TINY))


def filled(factors, seed=1):
    """Factors of which none is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), factors)


def test_a_zero_start_is_the_base_bit_for_bit(params):
    for dtype in (jnp.float32, jnp.bfloat16):
        low = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
        factors = lora.init(low, rank=3, key=jax.random.key(0))
        assert all(np.any(pair.down) and not np.any(pair.up) for pair in factors.values())
        for ours, theirs in zip(jax.tree.leaves(lora.merge(low, factors)), jax.tree.leaves(low), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_merging_is_applying_layer_by_layer(params):
    factors = filled(lora.init(params, rank=2, key=jax.random.key(0)))
    merged, base = (dict(nnx.to_flat_state(tree)) for tree in (lora.merge(params, factors, 0.5), params))
    stacked = 0
    for path, leaf in merged.items():
        pair, old, new = factors.get(".".join(map(str, path))), np.asarray(base[path][...]), np.asarray(leaf[...])
        if pair is None:
            assert path[-1] != "kernel"
            np.testing.assert_array_equal(new, old)
            continue
        stacked += old.ndim > 2
        for i in np.ndindex(old.shape[:-2]):
            x = np.linspace(-1, 1, old.shape[-2])
            applied = x @ old[i] + 0.5 * (x @ np.asarray(pair.down)[i]) @ np.asarray(pair.up)[i]
            np.testing.assert_allclose(x @ new[i], applied, atol=1e-5)
    assert stacked > 10


@pytest.fixture(scope="module")
def told():
    return latents_and_sigma(TINY), conditions(TINY)


def test_a_module_with_factors_is_the_merged_module(told):
    """At every kernel of a denoiser, stacked or not; and with zero factors it is the module itself, bit for bit."""
    model = random_dit(TINY)
    params = nnx.state(model)
    (latents, sigma), given = told
    velocity = jax.jit(lambda model: model(latents, sigma, given))
    zero = lora.init(params, rank=2, key=jax.random.key(0))
    plain = velocity(model)
    np.testing.assert_array_equal(velocity(lora.adapt(model, zero)), plain)
    factors = jax.tree.map(lambda x: 0.3 * x, filled(zero))
    graph, _ = nnx.split(model)
    merged = velocity(nnx.merge(graph, lora.merge(params, factors)))
    np.testing.assert_allclose(velocity(lora.adapt(model, factors)), merged, rtol=1e-3, atol=1e-4)
    assert np.abs(merged - plain).max() > 0.1
    assert model.image_in.up is None  # the module itself is as it was


def test_a_small_change_beside_a_bf16_kernel_is_not_lost():
    """1 + 0.003 is 1 in bf16; beside the kernel the change is heard."""
    layer = linear(4, 4, rngs=nnx.Rngs(0), bias=False)
    layer.kernel[...] = jnp.full((4, 4), 1.0)
    layer = jax.tree.map(lambda x: x.astype(jnp.bfloat16), layer)
    pair = {"kernel": lora.Factors(jnp.eye(4, 1), jnp.full((1, 4), 3e-3))}
    np.testing.assert_array_equal(lora.merge(nnx.state(layer), pair)["kernel"][...], layer.kernel[...])
    x = jnp.asarray([[1.0, -1.0, 0.5, -0.25]], jnp.bfloat16)  # the kernel gives 0.25, which has room for 0.003
    heard = lora.adapt(layer, pair)(x) - layer(x)
    assert heard.dtype == jnp.bfloat16
    np.testing.assert_allclose(heard.astype(jnp.float32), 3e-3, rtol=0.4)


def test_an_adapter_holds_factors_under_the_names_of_what_they_adapt(params):
    factors = filled(lora.init(params, rank=2, key=jax.random.key(0), adapts=lora.blocks_alone))
    adapter = lora.Adapter(factors)
    jax.tree.map(np.testing.assert_array_equal, adapter.factors(), factors)
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(adapter, nnx.Param))}
    assert paths == {f"{name}.{side}" for name in factors for side in ("down", "up")}
    assert {name.split(".")[0] for name in factors} == {"double", "single"}
    assert not any("modulation" in name for name in factors)


def test_gradients_are_those_of_the_factors_alone(params):
    """d/d up of sum(w * (k + down @ up)) is down^T @ w."""
    name = "image_in.kernel"
    factors = lora.init(params, rank=2, key=jax.random.key(0), adapts=lambda path, _: path == ("image_in", "kernel"))
    assert list(factors) == [name]
    w = jax.random.normal(jax.random.key(2), params["image_in"]["kernel"].shape)
    grads = jax.grad(lambda f: jnp.sum(w * lora.merge(params, f)["image_in"]["kernel"][...]))(factors)
    np.testing.assert_allclose(grads[name].up, factors[name].down.T @ w, rtol=1e-5, atol=1e-6)
    assert not np.any(grads[name].down)  # up is still zero


def test_a_small_change_survives_a_bf16_kernel_only_in_f32():
    kernel = nnx.State({"kernel": nnx.Param(jnp.full((4, 4), 1.0, jnp.bfloat16))})
    pair = {"kernel": lora.Factors(jnp.full((4, 1), 1.0), jnp.full((1, 4), 3e-3))}
    np.testing.assert_array_equal(lora.merge(kernel, pair)["kernel"][...], jnp.bfloat16(1.0))  # below half a step
    twice = lora.merge(kernel, pair, 2.0)["kernel"][...]
    np.testing.assert_array_equal(twice, jnp.bfloat16(1.0078125))
    assert twice.dtype == jnp.bfloat16


def test_on_a_mesh_it_is_what_it_is_on_one_device(params):
    factors = filled(lora.init(params, rank=2, key=jax.random.key(0)))
    expected = jax.tree.leaves(lora.merge(params, factors))
    mesh = make_mesh(data=4, seq=2)
    with jax.set_mesh(mesh):
        merged = jax.jit(lora.merge)(shard_parameters(params, mesh), shard_parameters(factors, mesh))
    for one, two in zip(expected, jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(two, one, atol=1e-6)
        assert two.sharding.is_equivalent_to(jax.NamedSharding(mesh, parameter_spec(one.shape, mesh)), one.ndim)


def test_factors_of_another_model_are_named(params):
    factors = lora.init(params, rank=2, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"not there: nowhere\.kernel"):
        lora.merge(params, {**factors, "nowhere.kernel": factors["image_in.kernel"]})
    other = jax.tree.map(lambda x: x[..., :1], factors["image_in.kernel"])
    with pytest.raises(ValueError, match=r"image_in\.kernel: factors of a kernel"):
        lora.merge(params, {"image_in.kernel": other})
    with pytest.raises(ValueError, match="rank is 0"):
        lora.init(params, rank=0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="no kernel is adapted"):
        lora.init(params, rank=1, key=jax.random.key(0), adapts=lambda path, shape: False)
