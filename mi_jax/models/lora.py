"""Low-rank adaptation (LoRA, arXiv 2106.09685): small factors beside the kernels of a module that stays as it is.

    factors = init(nnx.state(model), rank=16, key=key)
    adapted = adapt(model, factors)                       # in training: only factors get gradients and moments
    merged = merge(nnx.state(model), factors)             # in what is handed on: kernels of the old shapes

Pure functions over trees of parameters, but for `adapt`, whose module shares the arrays of the one that it is given.
Kernels of stacked layers [*layers d e] have stacked factors, and nothing loops over layers.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key

from mi_jax.mesh import spec_of

Path = tuple[str | int, ...]
Module = TypeVar("Module", bound=nnx.Module)


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


def blocks_alone(path: Path, shape: tuple[int, ...]) -> bool:
    """The kernels of a denoiser's blocks: attention, audio attention and MLPs, not what modulates them."""
    return path[0] in ("double", "single") and "modulation" not in path and every_kernel(path, shape)


def adapt(module: Module, factors: dict[str, Factors]) -> Module:
    """The module whose linear maps add `(x @ down) @ up` to what they give. Zero factors give the same bits.

    Nothing of the size of a kernel is made, nor is any gradient of one; and what is small beside its kernel is not
    lost to the rounding of a sum. Arrays are shared with `module`.

    Raises:
      ValueError: factors of a kernel that is not there, or of another shape.
    """
    adapted = nnx.merge(*nnx.split(module))
    check(nnx.state(module), factors)
    for name, pair in factors.items():
        owner = functools.reduce(getattr, name.split(".")[:-1], adapted)
        owner.down, owner.up = nnx.Param(pair.down), nnx.Param(pair.up)
    return adapted


class Adapter(nnx.Module):
    """Factors as the parameters of a module, so that a trainer finds them, under the names of what they adapt:
    `double.blocks.video.out.kernel.down`."""

    def __init__(self, factors: dict[str, Factors]):
        tree: dict[str, Any] = {}
        for name, pair in factors.items():
            leaf = tree
            for part in name.split("."):
                leaf = leaf.setdefault(part, {})
            leaf |= {"down": nnx.Param(pair.down), "up": nnx.Param(pair.up)}
        for name, branch in tree.items():
            setattr(self, name, _as_modules(branch))

    def factors(self) -> dict[str, Factors]:
        """What the module was made of, or what it was trained to."""
        pairs: dict[str, dict[str, Any]] = {}
        for path, leaf in nnx.to_flat_state(nnx.state(self, nnx.Param)):
            pairs.setdefault(".".join(map(str, path[:-1])), {})[path[-1]] = leaf[...]
        return {name: Factors(**pair) for name, pair in pairs.items()}


def _as_modules(tree: Any) -> Any:
    return nnx.Dict({name: _as_modules(branch) for name, branch in tree.items()}) if isinstance(tree, dict) else tree


def check(params: Any, factors: dict[str, Factors]) -> None:
    """Raises ValueError where factors are of a kernel that is not among `params`, or of one of another shape."""
    shapes = {".".join(map(str, path)): tuple(leaf.shape) for path, leaf in nnx.to_flat_state(params)}
    strangers = sorted(factors.keys() - shapes.keys())
    if strangers:
        raise ValueError(f"factors of kernels that are not there: {', '.join(strangers)}")
    for name, pair in factors.items():
        shape = (*pair.down.shape[:-1], pair.up.shape[-1])
        if shape != shapes[name] or pair.down.shape[-1] != pair.up.shape[-2]:
            raise ValueError(f"{name}: factors of a kernel {shape}, this one is {shapes[name]}")


def merge(params: Any, factors: dict[str, Factors], scale: float | Float[Array, ""] = 1.0) -> Any:
    """`params` with `kernel + scale * down @ up` in the place of every kernel that has factors.

    The sum is f32 and then rounded to the kernel's dtype: a change that is small beside its kernel is lost where the
    two are summed in bf16. Zero factors give the same bits. On a mesh kernels stay spread as they are.

    Raises:
      ValueError: factors of a kernel that is not there, or of another shape.
    """
    leaves = dict(nnx.to_flat_state(params))
    paths = {".".join(map(str, path)): path for path in leaves}
    check(params, factors)
    for name, pair in factors.items():
        variable = leaves[paths[name]]
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
