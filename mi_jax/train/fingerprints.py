"""Numbers that tell arrays from others, bit by bit, wherever they lie: what was saved is what is read."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from mi_jax.mesh import spec_of

_PRIMES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1)


@jax.jit
def fingerprints(tree: Any) -> UInt32[Array, "leaves 2"]:
    """Two sums, modulo 2^32, of each leaf's bits, every entry weighted by its place. They do not depend on how leaves
    are spread over devices; another value at one place changes the first for certain."""
    return jnp.stack([_of(leaf) for leaf in jax.tree.leaves(tree)] or [jnp.zeros(2, jnp.uint32)])


def _of(leaf: Array) -> Array:
    if leaf.dtype == jnp.bool_:
        bits = leaf.astype(jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
    sharding = None if spec_of(leaf) is None else jax.typeof(leaf).sharding
    weight = jnp.ones_like(bits)
    for axis in range(leaf.ndim):
        place = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis, out_sharding=sharding)
        weight += place * jnp.uint32(2 * (_PRIMES[axis % len(_PRIMES)] >> 1))  # even: the sum stays odd
    mixed = (bits ^ (bits >> 15)) * jnp.uint32(0x2C1B3C6D)
    return jnp.stack([jnp.sum(bits * weight, dtype=jnp.uint32), jnp.sum((mixed ^ weight) * mixed, dtype=jnp.uint32)])


def words(prints: UInt32[Array, "leaves 2"]) -> list[str]:
    """One word for each leaf."""
    return [f"{first:08x}{second:08x}" for first, second in np.asarray(jax.device_get(prints)).tolist()]
