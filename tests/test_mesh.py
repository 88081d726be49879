"""Meshes and fully sharded parameters, on eight simulated devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from mi_jax.errors import InputError
from mi_jax.mesh import gather_parameters, make_mesh, parameter_spec, shard_parameters


def test_mesh_is_explicit_and_counts_its_devices():
    mesh = make_mesh(data=4, seq=2)
    assert dict(mesh.shape) == {"data": 4, "seq": 2}
    assert all(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types)
    with pytest.raises(InputError, match="data=3 x seq=2 needs 6 devices, there are 8"):
        make_mesh(data=3, seq=2)


def test_parameters_spread_along_their_largest_divisible_dimension():
    mesh = make_mesh(data=4, seq=2)
    assert parameter_spec((20, 3072, 9216), mesh) == P(None, None, ("data", "seq"))
    assert parameter_spec((20, 12288, 3072), mesh) == P(None, ("data", "seq"), None)
    assert parameter_spec((128,), mesh) == P()
    assert parameter_spec((3, 5), mesh) == P()
    assert parameter_spec((64, 64), make_mesh(data=1, seq=1, devices=jax.devices()[:1])) == P()


def test_a_mesh_that_divides_no_width_spreads_over_one_axis():
    """25 hosts of 8 GPUs: 3072 = 2^10 x 3 has no factor of 25, so the hosts hold the same shards (hybrid sharding)."""
    mesh = AbstractMesh((25, 8), ("data", "seq"))
    assert parameter_spec((20, 3072, 9216), mesh) == P(None, None, "seq")
    assert parameter_spec((20, 12288, 3072), mesh) == P(None, "seq", None)
    assert parameter_spec((8, 9600), mesh) == P(None, ("data", "seq"))
    assert parameter_spec((16, 3), AbstractMesh((16, 5), ("data", "seq"))) == P("data", None)


def test_gather_is_the_identity_and_scatters_gradients():
    mesh = make_mesh(data=8)
    kernel = jax.random.normal(jax.random.key(0), (16, 24))
    x = jax.random.normal(jax.random.key(1), (8, 16))
    loss = lambda kernel, x: jnp.sum(jnp.sin(x @ gather_parameters(kernel)))  # noqa: E731
    expected = jax.grad(loss)(kernel, x)
    with jax.set_mesh(mesh):
        spread = shard_parameters(kernel, mesh)
        assert spread.sharding.spec == P(None, ("data", "seq"))
        gradient = jax.jit(jax.grad(loss))(spread, jax.device_put(x, P("data")))
    assert gradient.sharding.spec == P(None, ("data", "seq"))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
