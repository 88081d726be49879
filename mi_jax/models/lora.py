"""Low-rank adaptation (LoRA, arXiv 2106.09685): small factors beside the kernels of a module that stays as it is.

    factors = init(nnx.state(model), rank=16, key=key)
    adapted = nnx.merge(graph, merge(params, factors))          # inside the loss; gradients go to the factors

Pure functions over trees of parameters: the module knows nothing of it. Kernels of stacked layers [*layers d e] have
stacked factors, and nothing loops over layers.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key

from mi_jax.mesh import spec_of

Path = tuple[str | int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """The change of one kernel [*layers d e]: `down @ up`, of which `up` starts at zero. Untyped: JAX also fills them
    with tracers and specs.

    down: [*layers d rank]. up: [*layers rank e].
    """

    down: Any
    up: Any


def every_kernel(path: Path, shape: tuple[int, ...]) -> bool:
    """The kernels of linear maps, one by one or stacked; not those of convolutions, whose taps are no layers."""
    return path[-1] == "kernel" and 2 <= len(shape) <= 4


def init(
    params: Any, *, rank: int, key: Key[Array, ""], adapts: Callable[[Path, tuple[int, ...]], bool] = every_kernel
) -> dict[str, Factors]:
    """Factors, by dotted path, of the kernels that `adapts` names: `down` is Xavier's, `up` zero, f32.

    Which values a kernel's factors get depends on the key and its path alone. `params` may be abstract.

    Raises:
      ValueError: a rank under 1, or no kernel is adapted.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}, must be at least 1")
    flat = [(path, leaf) for path, leaf in nnx.to_flat_state(params) if adapts(path, tuple(leaf.shape))]
    if not flat:
        raise ValueError("no kernel is adapted")
    draw = nnx.initializers.xavier_uniform()
    factors = {}
    for path, leaf in flat:
        name, (*layers, d, e) = ".".join(map(str, path)), leaf.shape
        own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
        drawn = jax.vmap(lambda k, d=d: draw(k, (d, rank), jnp.float32))(jax.random.split(own_key, math.prod(layers)))
        factors[name] = Factors(drawn.reshape(*layers, d, rank), jnp.zeros((*layers, rank, e), jnp.float32))
    return factors


def merge(params: Any, factors: dict[str, Factors], scale: float | Float[Array, ""] = 1.0) -> Any:
    """`params` with `kernel + scale * down @ up` in the place of every kernel that has factors.

    The sum is f32 and then rounded to the kernel's dtype: a change that is small beside its kernel is lost where the
    two are summed in bf16. Zero factors give the same bits. On a mesh kernels stay spread as they are.

    Raises:
      ValueError: factors of a kernel that is not there, or of another shape.
    """
    leaves = dict(nnx.to_flat_state(params))
    paths = {".".join(map(str, path)): path for path in leaves}
    strangers = sorted(factors.keys() - paths.keys())
    if strangers:
        raise ValueError(f"factors of kernels that are not there: {', '.join(strangers)}")
    for name, pair in factors.items():
        variable = leaves[paths[name]]
        shape = (*pair.down.shape[:-1], pair.up.shape[-1])
        if shape != tuple(variable.shape):
            raise ValueError(f"{name}: factors of a kernel {shape}, this one is {tuple(variable.shape)}")
        leaves[paths[name]] = variable.replace(_merged(variable[...], pair, scale))
    return nnx.from_flat_state(leaves)


def _merged(kernel: Array, pair: Factors, scale: float | Array) -> Array:
    down, up = pair.down.astype(jnp.float32), pair.up.astype(jnp.float32)
    spec = spec_of(kernel)
    if spec is not None:  # each device makes the change of its own part of the kernel
        *layers, d, e = (*spec, *[None] * (kernel.ndim - len(spec)))
        down, up = jax.reshard(down, P(*layers, d, None)), jax.reshard(up, P(*layers, None, e))
    change = jnp.einsum("...dr,...re->...de", down, up, preferred_element_type=jnp.float32)
    return (kernel.astype(jnp.float32) + scale * change).astype(kernel.dtype)
