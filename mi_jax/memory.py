"""How much of a GPU's memory a process takes, and how much of it is left."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # JAX must not start before `claim_gpu_memory`
    import jax

GPU_SHARE = 0.93
"""Of the memory that CUDA reports. The rest is for what is not JAX's: CUDA's context, NCCL's buffers, cuDNN's plans."""


def claim_gpu_memory() -> None:
    """Lets JAX take `GPU_SHARE` instead of three quarters, unless the user says otherwise. Before JAX's first array."""
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name; both at once are an error
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(GPU_SHARE))


def free_bytes(devices: "Iterable[jax.Device]") -> int | None:
    """What the fullest of `devices` has left for JAX's arrays; None where the backend does not tell, as on CPUs."""
    stats = [device.memory_stats() or {} for device in devices]
    left = [stat["bytes_limit"] - stat.get("bytes_in_use", 0) for stat in stats if "bytes_limit" in stat]
    return min(left) if left else None
