"""What the transformer encoders share: stacked layers run by one `jax.lax.scan`, and embedding lookup on a mesh.

A stack of equal layers is one module whose leaves have a leading depth axis.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mi_jax.mesh import gather_parameters

Layer = TypeVar("Layer", bound=nnx.Module)
State = TypeVar("State")


def stack_layers(make: Callable[[nnx.Rngs], Layer], depth: int, rngs: nnx.Rngs) -> Layer:
    """`depth` layers, drawn independently, as one module: every parameter gains a leading axis of length `depth`."""
    return jax.vmap(make)(rngs.split(depth))


def run_layers(layers: Layer, step: Callable[[Layer, State], State], x: State, depth: int, count: int) -> State:
    """The first `count` of `depth` stacked layers applied to `x`: `step(layer, x)` is one layer.

    Encoders read a hidden state before the last layer. The layers after it are skipped inside the scan rather than
    sliced off before it: slicing would copy the weights of all the others.

    Raises:
        ValueError: `count` is outside 0..depth.
    """
    if not 0 <= count <= depth:
        raise ValueError(f"cannot run {count} of {depth} layers")
    if count == depth:
        return jax.lax.scan(lambda x, layer: (step(gather_parameters(layer), x), None), x, layers)[0]

    def body(x: State, layer_and_use):
        layer, use = layer_and_use
        return jax.lax.cond(use, lambda x: step(gather_parameters(layer), x), lambda x: x, x), None

    return jax.lax.scan(body, x, (layers, jnp.arange(depth) < count))[0]


def lookup(table: Float[Array, "v d"], ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
    """Rows of an embedding table, laid out over the mesh as the ids are."""
    if jax.sharding.get_abstract_mesh().empty:
        return table[ids]
    return gather_parameters(table).at[ids].get(out_sharding=P(*jax.typeof(ids).sharding.spec, None))
