"""Meshes and shardings: one mesh of two Explicit axes, parameters spread over both."""

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mi_jax.bounds import fault_of
from mi_jax.errors import InputError

AXES = ("data", "seq")


def make_mesh(data: int | None = None, seq: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of `data` x `seq` devices with Explicit axes.

    `data` carries batches (and windows, and guidance branches), `seq` the tokens of one video; parameters are spread
    over both. By default all devices serve `data`.

    Raises:
      InputError: `data * seq` is not the number of devices, or one of them is no number of devices.
    """
    devices = list(jax.devices()) if devices is None else devices
    if seq < 1 or (data is not None and data < 1):
        raise InputError(f"a mesh of data={data} x seq={seq}: both are at least 1")
    data = len(devices) // seq if data is None else data
    if data * seq != len(devices):
        raise InputError(f"a mesh of data={data} x seq={seq} needs {data * seq} devices, there are {len(devices)}")
    # An axis of a torus may have to serve both of the mesh's (8 x 8 on 4 x 4 x 4 chips).
    placed = mesh_utils.create_device_mesh((data, seq), devices, allow_split_physical_axes=True)
    return Mesh(by_process(placed), AXES, axis_types=(AxisType.Explicit,) * 2)


def take_devices(count: int | None = None, seq: int | None = None) -> list[jax.Device]:
    """The first `count` devices of this process, by default all, of which `seq` are to share a video's tokens.

    Raises:
      InputError: there are not so many, or `seq` does not divide them.
    """
    devices = jax.local_devices()
    fault = fault_of(int | None, count, "devices") or fault_of(int | None, seq, "seq")
    if fault:
        raise InputError(fault)
    if count is not None and not 1 <= count <= len(devices):
        raise InputError(f"devices is {count}, but there are {len(devices)} ({devices[0].device_kind})")
    devices = devices[:count]
    if seq is not None and (seq < 1 or len(devices) % seq):
        raise InputError(f"seq is {seq}, which does not divide the number of devices, {len(devices)}")
    return devices


def by_process(placed: np.ndarray) -> np.ndarray:
    """Devices [data seq] with the rows of one process side by side, so that it reads one piece of every batch.

    On a torus of TPUs the best places scatter the rows of a host. Which devices share a row, or a column, stays.
    """
    return placed[sorted(range(len(placed)), key=lambda row: sorted({device.process_index for device in placed[row]}))]


@contextlib.contextmanager
def on_mesh(mesh: Mesh | None) -> Iterator[None]:
    """What is traced inside runs on `mesh`; None: on the default device.

    Axes of size one lay nothing out; kept out of the types, they ask nothing of a model that runs on one device.
    """
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh), jax.remove_size_one_mesh_axis_from_type(True):
        yield


def off_mesh() -> AbstractContextManager:
    """What is run inside runs on the devices of its arguments, whatever mesh is in force outside."""
    return jax.set_mesh(Mesh(np.empty((), dtype=object), ()))


def parameter_spec(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """FSDP: the largest dimension that the whole mesh divides is spread over both axes. Never the first one of a stack
    (of layers that a scan takes one by one, or of a kernel's taps): of a matrix, that is, only if it is the larger.

    Where the whole mesh divides none (25 hosts of 8 GPUs, and widths of 2^n 3), it is the largest that one axis
    divides, spread over the longer such axis and the same along the other (hybrid sharding). What nothing divides, and
    small leaves (norm scales, biases below one row per device), stays whole: gathering it costs more than it weighs.
    """
    if len(shape) < 2:
        return P()
    sizes = dict(mesh.shape)
    stacked = len(shape) > 2 or shape[0] < shape[1]
    for axes in (AXES, *sorted(((name,) for name in AXES[::-1]), key=lambda axes: -sizes[axes[0]])):
        shards = math.prod(sizes[name] for name in axes)
        candidates = [i for i, n in enumerate(shape) if n % shards == 0 and n >= shards and (i or not stacked)]
        if shards > 1 and candidates:
            largest = max(candidates, key=lambda i: (shape[i], i))
            return P(*((axes if len(axes) > 1 else axes[0]) if i == largest else None for i in range(len(shape))))
    return P()


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


def spread_batch(tree):
    """The first axis of every leaf over the mesh's `data` axis, where there is one that divides it."""
    mesh = jax.sharding.get_abstract_mesh()
    if "data" not in mesh.axis_names:
        return tree
    return jax.tree.map(lambda x: jax.reshard(x, P("data" if x.shape[0] % mesh.shape["data"] == 0 else None)), tree)


def gather(x: jax.Array) -> jax.Array:
    """The whole of `x` on every device of the mesh in force."""
    return jax.reshard(x, P()) if jax.sharding.get_abstract_mesh().axis_names else x


def axis_size(name: str) -> int:
    """Devices along a mesh axis; 1 without a mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(name, 1)


def platform() -> str:
    """Where what is traced will run: "cpu", "gpu" or "tpu". That of the mesh in force, which may be of devices that are
    not here (`mi-jax plan`); without one, JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def vary_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """`x`, which every device has alike, as one that differs between devices as `other` does: the start of a scan over
    it inside `per_device`, or what a custom gradient multiplies it with. Outside `per_device` it does nothing."""
    own, wanted = (jax.typeof(part).manual_axis_type.varying for part in (x, other))
    return jax.lax.pcast(x, tuple(wanted - own), to="varying") if wanted - own else x
