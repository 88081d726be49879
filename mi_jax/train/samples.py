"""What a model makes of a batch while it is trained: sampled where its parameters lie, shown on one process."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from mi_jax.mesh import make_mesh, on_mesh
from mi_jax.train.objective import TrainConfig
from mi_jax.train.state import compute_copy, merge_model


def sampler(config: TrainConfig, graph: Any, batch: dict[str, jax.Array]) -> Callable:
    """`show(params, frozen, step)` samples on the mesh in force, where parameters and `batch` lie, and returns a
    function that makes pictures of it on one process (`Objective.sample`, `Objective.show`)."""
    objective = config.objective
    _, step_key = jax.random.split(jax.random.key(config.seed))

    @jax.jit
    def sample(params, frozen, batch, key):
        params, frozen = (compute_copy(tree, config.compute_dtype) for tree in (params, frozen))
        sampled = objective.sample(merge_model(graph, params, frozen), batch, key)
        return sampled if mesh.size <= 1 else jax.tree.map(lambda x: jax.reshard(x, P()), sampled)

    mesh = jax.sharding.get_mesh()

    def show(params, frozen, step):
        sampled = sample(params, frozen, batch, jax.random.fold_in(step_key, step))

        def pictures():
            here = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), sampled)
            with on_mesh(make_mesh(data=1, devices=jax.local_devices()[:1])):
                return objective.show(here)

        return pictures

    return show
