"""Meshes and shardings: one mesh of two Explicit axes, parameters spread over both (DESIGN section 6)."""

from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mi_jax.errors import InputError

AXES = ("data", "seq")


def make_mesh(data: int | None = None, seq: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of `data` x `seq` devices with Explicit axes.

    `data` carries batches (and windows, and guidance branches), `seq` the tokens of one video; parameters are spread
    over both. By default all devices serve `data`.

    Raises:
      InputError: `data * seq` is not the number of devices.
    """
    devices = list(jax.devices()) if devices is None else devices
    data = len(devices) // seq if data is None else data
    if data * seq != len(devices):
        raise InputError(f"a mesh of data={data} x seq={seq} needs {data * seq} devices, there are {len(devices)}")
    return jax.make_mesh((data, seq), AXES, devices=devices, axis_types=(AxisType.Explicit,) * 2)


def parameter_spec(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """FSDP: the largest dimension that the whole mesh divides is spread over both axes; else replicated.

    Small leaves (norm scales, biases below one row per device) stay whole: gathering them costs more than they weigh.
    """
    shards = mesh.size
    candidates = [i for i, n in enumerate(shape) if n % shards == 0 and n >= shards]
    if shards == 1 or not candidates or len(shape) < 2:
        return P()
    largest = max(candidates, key=lambda i: (shape[i], i))
    return P(*(AXES if i == largest else None for i in range(len(shape))))


def shard_parameters(tree, mesh: Mesh):
    """Places every leaf by `parameter_spec`."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, parameter_spec(leaf.shape, mesh))), tree)


def gather_parameters(tree):
    """The whole of parameters that `parameter_spec` spread over the mesh, at the place of use.

    Called inside a scanned body, it gathers one body's (already cast) parameters at a time, and its transpose
    scatters the gradients: fully sharded data parallelism. Without a mesh, or with everything in one place, it does
    nothing.
    """
    if jax.sharding.get_abstract_mesh().size <= 1:
        return tree
    return jax.tree.map(lambda leaf: jax.reshard(leaf, P()), tree)


def per_device(f: Callable, out_specs) -> Callable:
    """`f` of each device's own share of its arguments, which are spread as their types say (`jax.shard_map`).

    Inside, shapes are local and may be split and merged at will, and collectives are written out. Without a mesh, or
    with one device, it is `f`.
    """
    return f if jax.sharding.get_abstract_mesh().size <= 1 else jax.shard_map(f, out_specs=out_specs)


def spec_of(x: jax.Array) -> P | None:
    """How `x` is spread over the mesh; None without a mesh."""
    return None if jax.sharding.get_abstract_mesh().empty else jax.typeof(x).sharding.spec


def batch_axis(x: jax.Array) -> str | None:
    """The mesh axis that the first dimension of `x` is spread over."""
    spec = spec_of(x)
    return spec[0] if spec else None


def axis_size(name: str) -> int:
    """Devices along a mesh axis; 1 without a mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(name, 1)


def vary_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """`x`, which every device has alike, as one that differs between devices as `other` does: the start of a scan over
    it inside `per_device`."""
    if jax.sharding.get_abstract_mesh().size <= 1:
        return x
    return x + 0 * jax.lax.stop_gradient(other.ravel()[0]).astype(x.dtype)
