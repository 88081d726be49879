"""Meshes and fully sharded parameters, on eight simulated devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from mi_jax.errors import InputError
from mi_jax.mesh import by_process, gather_parameters, make_mesh, parameter_spec, shard_parameters
from mi_jax.models.dit import DiT, DiTConfig


def test_mesh_is_explicit_and_counts_its_devices():
    mesh = make_mesh(data=4, seq=2)
    assert dict(mesh.shape) == {"data": 4, "seq": 2}
    assert all(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types)
    with pytest.raises(InputError, match="data=3 x seq=2 needs 6 devices, there are 8"):
        make_mesh(data=3, seq=2)
    for wrong in ({"seq": 0}, {"data": 0}, {"data": -4, "seq": -2}):
        with pytest.raises(InputError, match="both are at least 1"):
            make_mesh(**wrong)


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


@pytest.mark.parametrize("shape", [(10, 8), (20, 8), (20, 1), (40, 1), (1, 20), (25, 8), (24, 1)])
def test_layers_of_a_stack_are_never_spread(shape):
    """A scan takes them one by one: the 13B model has 20 double and 20 x 2 single blocks, CLIP has 24."""
    mesh = AbstractMesh(shape, ("data", "seq"))
    for leaf in [(20, 3072, 9216), (20, 2, 3072, 21504), (20, 3072), (20, 128), (24, 1024, 4096), (24, 1024)]:
        assert not any(parameter_spec(leaf, mesh)[:1])
    assert parameter_spec((3072, 64), AbstractMesh((8, 8), ("data", "seq"))) == P(("data", "seq"), None)


@pytest.mark.parametrize("audio", [False, True])
def test_the_13b_models_blocks_stay_whole_on_meshes_that_divide_their_number(audio):
    """Of 10 and 20 hosts of 8 GPUs the hosts' number divides the blocks'."""
    config = DiTConfig.magic_infinite_13b(audio=audio)
    for data in (10, 20):
        mesh = AbstractMesh((data, 8), ("data", "seq"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
        shapes = nnx.eval_shape(lambda: DiT(config, rngs=nnx.Rngs(0)))
        stacked = [leaf.shape for leaf in jax.tree.leaves(nnx.state(shapes)) if leaf.shape[0] == 20]
        assert len(stacked) > 30
        assert not any(spec[0] for spec in (parameter_spec(shape, mesh) for shape in stacked) if spec)


class _Device(NamedTuple):
    id: int
    process_index: int


def test_rows_of_a_process_lie_side_by_side():
    """A host of 2 x 2 chips of a torus has rows 10, 11, 14 and 15, say: the rows move, not what is in them."""
    hosts = np.array([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3])
    placed = np.empty((16, 2), object)
    for row, host in enumerate(hosts):
        for column in range(2):
            placed[row, column] = _Device(id=2 * row + column, process_index=int(host))
    moved = by_process(placed)
    assert [device.process_index for device in moved[:, 0]] == sorted(hosts.tolist())
    assert {tuple(row) for row in moved} == {tuple(row) for row in placed}
    assert [set(column) for column in moved.T] == [set(column) for column in placed.T]
    np.testing.assert_array_equal(by_process(moved), moved)


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
