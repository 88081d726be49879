"""How much memory there is: of a GPU what a process takes and what is left, and on the host."""

import os
import pathlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mi_jax.errors import InputError

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


def host_bytes() -> int | None:
    """Memory of the machine, or of the container (cgroup 2) where that is less; None where the system does not tell."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return None
    try:
        return min(total, int(pathlib.Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # none, or "max"
        return total


def check_host_memory(wanted: int, what: str) -> None:
    """Raises InputError where `what` takes more bytes than the machine has: a line beforehand instead of a process that
    the system ends. `wanted` is the least that it can be done with."""
    there = host_bytes()
    if there is not None and wanted > there:
        raise InputError(f"{what} takes at least {as_size(wanted)} of memory, this machine has {as_size(there)}")


def as_size(count: int | float) -> str:
    """Bytes for people: "3.52 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if unit != "GiB" else f"{count:.4g} GiB"
        count = count / 1024
    return f"{count:.4g} TiB"
