"""Models of ours filled from the tensors of a reference in PyTorch, by the tables of `mi_jax.weights`."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mi_jax.weights.rows import Table, leaf_shapes, plan


def fill(build: Callable[[], nnx.Module], table: Table, tensors: Mapping[str, np.ndarray]) -> nnx.Module:
    """The module that `build` makes with every leaf taken from `tensors`; fails on a shape that differs."""
    leaves = {leaf: np.full(shape, np.nan, np.float32) for leaf, shape in leaf_shapes(build).items()}
    for row in plan({leaf: array.shape for leaf, array in leaves.items()}, table):
        made = row.make(*(tensors[name] for name in row.sources))
        place = leaves[row.leaf]
        if row.index is not None:
            place = place[np.unravel_index(row.index, place.shape[: row.axes])]
        assert made.shape == place.shape, (row.leaf, made.shape, place.shape)
        place[...] = made
    graph, state = nnx.split(nnx.eval_shape(build))
    filled = [
        (path, variable.replace(jnp.asarray(leaves[".".join(map(str, path))])))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def numpy_tensors(module) -> dict[str, np.ndarray]:
    """The state of a PyTorch module by name."""
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def relative_error(ours, reference) -> float:
    """||ours - reference|| / ||reference||, of equal shapes."""
    if hasattr(reference, "detach"):
        reference = reference.detach()
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))
