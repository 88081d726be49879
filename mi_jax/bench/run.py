"""One bench, from its options to its result."""

import datetime
import os
import pathlib
import platform
from typing import Any

import jax


def about_this_machine() -> dict[str, Any]:
    """What a measurement is of: device, software and date (UTC)."""
    device = jax.devices()[0]
    cpu = _cpu_name()
    return {
        "device": cpu if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count() if device.platform != "cpu" else 1,
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
