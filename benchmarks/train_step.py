"""Seconds of one training step of an experiment, for each batch shape that its data has.

    python benchmarks/train_step.py configs/puppet_vae.py [--objective.batch-size 4 ...]

The state is donated and every step waits for the one before, as in training; the data is drawn in advance. The least
of `REPEATS` steps is printed, since other work on the machine only adds to it.

On Linux the many short-lived buffers of a CPU step are worth huge pages:
GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/train_step.py ...
"""

import json
import os
import sys
import time

import jax
import numpy as np

from mi_jax.mesh import make_mesh, on_mesh, shard_parameters
from mi_jax.train.loop import arrays_of, to_devices
from mi_jax.train.objective import load_config
from mi_jax.train.state import init_state, make_step, split_model

REPEATS, BATCHES = 6, 24


def main(path: str, *overrides: str) -> None:
    config, mesh = load_config(path, overrides), make_mesh()
    with on_mesh(mesh):
        graph, params, frozen = split_model(config.objective.init(jax.random.key(config.seed)), config.objective)
        params, frozen = shard_parameters(params, mesh), shard_parameters(frozen, mesh)
        trained = sum(leaf.size for leaf in jax.tree.leaves(params))
        state, step = init_state(config, params, jax.random.key(1)), make_step(config, graph)
        batches = {}
        for _, batch in zip(range(BATCHES), config.objective.dataset(config.seed)):
            batch = arrays_of(batch)
            batches.setdefault(max(batch.values(), key=np.size).shape, batch)
        for shape, batch in batches.items():
            told = to_devices(batch, mesh)
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, frozen, told))
            first, seconds = time.perf_counter() - start, []
            for _ in range(REPEATS):
                start = time.perf_counter()
                state, metrics = jax.block_until_ready(step(state, frozen, told))
                seconds.append(time.perf_counter() - start)
            assert np.isfinite(metrics["loss"])
            found = {"config": config.name, "batch": shape, "trained": trained, "first_seconds": round(first, 2)}
            cores = len(os.sched_getaffinity(0))
            print(json.dumps(found | {"step_seconds": round(min(seconds), 4), "cores": cores}), flush=True)


if __name__ == "__main__":
    # Grain's workers are spawned: they import this file again.
    import absl.flags

    absl.flags.FLAGS.mark_as_parsed()
    main(*sys.argv[1:])
