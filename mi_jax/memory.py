"""How much memory a process takes of a GPU, and how much is left there and on the host."""

import os
import pathlib
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


def available_bytes() -> int | None:
    """What the host can still give to this process, by Linux and by the limit of its container; None elsewhere."""
    left = []
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        left += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        limit, used = (pathlib.Path("/sys/fs/cgroup", f"memory.{name}").read_text() for name in ("max", "current"))
        left.append(max(0, int(limit) - int(used)))  # "max": no limit
    except (OSError, ValueError, IndexError):
        pass
    return min(left, default=None)
