"""Training from device memory: where the pool of all training data lies, and which kind of batch each call draws."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mi_jax.errors import InputError
from mi_jax.memory import free_bytes
from mi_jax.train.objective import Objective, TrainConfig


def check_pool(config: TrainConfig) -> None:
    """Raises InputError where the objective has no pool to train from, as `config.on_device` asks."""
    if config.on_device and not hasattr(config.objective, "pool"):
        raise InputError(
            f"{config.name}: --on-device is for objectives with a pool of all their data, which "
            f"{type(config.objective).__name__} has not"
        )


def pool_on(mesh: Mesh, objective: Objective) -> dict[str, jax.Array]:
    """The objective's pool, whole on every device of `mesh`; each process reads all of it.

    Raises:
      InputError: it does not fit beside what lies there already, where the backend tells how much that is.
    """
    pool, whole = objective.pool(), NamedSharding(mesh, P())
    needed, left = sum(x.nbytes for x in pool.values()), free_bytes(mesh.local_devices)
    if left is not None and needed > left:
        raise InputError(
            f"--on-device: the pool takes {needed:,} bytes of every device's memory, which has {left:,} left; train "
            "without, or on fewer records"
        )
    # One array after the other, so that the host's copy shrinks as the device's grows.
    return {name: jax.make_array_from_process_local_data(whole, pool.pop(name)) for name in list(pool)}


def kind_of_call(seed: int, call: int, shares: tuple[float, ...]) -> int:
    """The kind of batch that call number `call` of a run draws: by `shares`, and the same whenever it is asked."""
    shares = np.asarray(shares) / np.sum(shares)
    return int(np.random.default_rng((seed, call)).choice(len(shares), p=shares))
