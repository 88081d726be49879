"""Machines to plan for, and what their makers say of them; none needs to be here."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Callable
from typing import Any, Literal

import jax

from mi_jax.errors import InputError
from mi_jax.memory import GPU_SHARE

GB, GIB = 1e9, 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One device as programs see it (a GPU, a TPU chip, or one of the two chiplets of a v7x chip).

    flops: dense bf16, per second. memory: bytes in all. hbm: bytes per second.
    link: bytes per second and direction: of all of a GPU's NVLinks, of one ICI link of a TPU.
    network: bytes per second and direction of a device's share of what leaves its host; 0 where ICI is all there is.
    per_host: devices that NVLink joins; 0 for a torus.
    source: where the numbers stand.
    """

    name: str
    flops: float
    memory: int
    hbm: float
    link: float
    network: float = 0.0
    per_host: int = 0
    source: str

    @property
    def usable(self) -> int:
        """Bytes that a program may have: on a GPU, what `mi-jax` takes of it."""
        return int(GPU_SHARE * self.memory) if self.per_host else self.memory

    @property
    def is_torus(self) -> bool:
        return self.per_host == 0


_NVLINK = {"link": 450 * GB, "network": 50 * GB, "per_host": 8}
DEVICES = {
    "h100": Device(
        name="H100 SXM",
        flops=989.4e12,
        memory=84_929_347_584,
        hbm=3.352e12,
        source="NVIDIA H100 datasheet: 1,979 TFLOP/s bf16 with sparsity, 3.35 TB/s, NVLink 900 GB/s both ways; DGX "
        "H100: a 400 Gb/s port for each GPU; memory: what CUDA reports (openxla/xla#25919)",
        **_NVLINK,
    ),
    "h200": Device(
        name="H200 SXM",
        flops=989.4e12,
        memory=150_121_545_728,
        hbm=4.8e12,
        source="NVIDIA H200 datasheet: as the H100, with 141 GB at 4.8 TB/s; memory: 139.8 GiB, as CUDA reports it",
        **_NVLINK,
    ),
    "v5p": Device(
        name="TPU v5p",
        flops=459e12,
        memory=102_803_439_616,
        hbm=2.765e12,
        link=90 * GB,
        source="Google Cloud, TPU v5p: 459 TFLOP/s bf16, 95 GiB at 2,765 GB/s, 3D torus; How to Scale Your Model "
        "(2025): 90 GB/s a link and direction; memory: 95.74 GiB, as the compiler has it",
    ),
    "v6e": Device(
        name="TPU v6e",
        flops=918e12,
        memory=33_554_432_000,
        hbm=1.640e12,
        link=90 * GB,
        source="Google Cloud, TPU v6e: 918 TFLOP/s bf16, 32 GB at 1,640 GB/s, 2D torus; How to Scale Your Model "
        "(2025): 90 GB/s a link and direction; memory: 31.25 GiB, as the compiler has it",
    ),
    "v7x": Device(
        name="TPU7x chiplet",
        flops=2307e12 / 2,
        memory=94 * GIB,
        hbm=7.38e12 / 2,
        link=100 * GB / 2,
        source="Google Cloud, TPU7x (Ironwood): 2,307 TFLOP/s bf16, 192 GiB at 7,380 GB/s, 1,200 GB/s of ICI both ways "
        "over six links a chip; its two chiplets are devices of half of each",
    ),
    "cpu": Device(
        name="simulated CPU device",
        flops=100e9,
        memory=4 * GIB,
        hbm=20 * GB,
        link=10 * GB,
        network=10 * GB,
        per_host=8,
        source="no machine: round numbers for tests",
    ),
}

_SLICES = {
    "v5p": {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"},
    "v6e": {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v7x": {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8"},
}
"""The slices that Google Cloud rents, by their number of chips."""
_CORES_IN_NAME = {"v5p": 2, "v6e": 1, "v7x": 2}
"""Google names slices by TensorCores: v5p-8 has 4 chips (one device each), tpu7x-8 has 4 chips (two devices each)."""

KNOWN = (
    "h100:1, h100:8, h100:HOSTSx8, h200:HOSTSx8 (1 to 256 GPUs), v5p-8 ... v5p-512, v6e-4 ... v6e-256, "
    "v7x-8 ... v7x-512, v5p:2x2x1 (chips along each axis), cpu:N"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Devices to compile for. `kind` is that of all of them; `devices` are JAX's descriptions."""

    name: str
    kind: Device
    devices: list[Any]
    platform: Literal["cuda", "tpu", "cpu"]


def find_topology(name: str) -> Topology:
    """The topology called `name`: see `KNOWN`.

    Raises:
      InputError: there is none of that name, or the plug-in that compiles for it is not installed.
    """
    match = re.fullmatch(r"(h100|h200|v5p|v6e|v7x|tpu7x|cpu)([:-])(\d+(?:x\d+)*)", name)
    if match is None:
        raise InputError(f"no topology {name!r}; there are {KNOWN}")
    kind, separator, size = match.groups()
    kind = "v7x" if kind == "tpu7x" else kind
    sides = tuple(map(int, size.split("x")))
    find: Callable = {"cpu": _cpu, "h100": _gpu, "h200": _gpu}.get(kind, _tpu)
    if (separator == "-") != (find is _tpu and len(sides) == 1) or not all(sides):
        raise InputError(f"no topology {name!r}; there are {KNOWN}")
    platform = {_cpu: "cpu", _gpu: "cuda", _tpu: "tpu"}[find]
    return Topology(name=name, kind=DEVICES[kind], devices=find(name, kind, sides), platform=platform)


def _cpu(name: str, kind: str, sides: tuple[int, ...]) -> list[Any]:
    if len(sides) != 1:
        raise InputError(f"no topology {name!r}: cpu:N is N simulated devices")
    devices = jax.devices("cpu")
    if sides[0] > len(devices):
        raise InputError(
            f"{name}: there are {len(devices)} simulated devices (JAX_NUM_CPU_DEVICES={sides[0]} makes more)"
        )
    return devices[: sides[0]]


# What XLA asks of a GPU when it compiles for one that is not there (openxla/xla#25919 has the H100's).
_HOPPER = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {hbm} l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: {cuda} patch: 0 }}
device_description_str: "NVIDIA {name}" """
_GPU_NAMES = {"h100": "H100 80GB HBM3", "h200": "H200"}


def _gpu(name: str, kind: str, sides: tuple[int, ...]) -> list[Any]:
    if len(sides) == 1:
        sides = (1, sides[0]) if sides[0] <= 8 else (sides[0] // 8, 8) if sides[0] % 8 == 0 else ()
    if len(sides) != 2 or sides[1] > 8 or sides[0] * sides[1] > 256:
        raise InputError(f"no topology {name!r}: {kind}:HOSTSxGPUS has at most 8 GPUs a host and 256 in all")
    device = DEVICES[kind]
    cuda = "13 minor: 0" if _installed("jax_plugins.xla_cuda13") else "12 minor: 8"
    config = _HOPPER.format(hbm=int(device.hbm), memory=device.memory, name=_GPU_NAMES[kind], cuda=cuda)
    return _described("cuda", kind, "jax-cuda12-plugin", target_config=config, topology=f"1x{sides[0]}x{sides[1]}")


def _tpu(name: str, kind: str, sides: tuple[int, ...]) -> list[Any]:
    if len(sides) == 1:
        slices = {chips * _CORES_IN_NAME[kind]: shape for chips, shape in _SLICES[kind].items()}
        if sides[0] not in slices:
            raise InputError(f"no topology {name!r}; of {kind} there are {', '.join(f'{kind}-{n}' for n in slices)}")
        shape = slices[sides[0]]
    else:
        shape = "x".join(map(str, sides))
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu else asks the cloud which machine this is
    return _described("tpu", f"{'tpu7x' if kind == 'v7x' else kind}:{shape}", "libtpu")


def _described(platform: str, wanted: str, package: str, **options: str) -> list[Any]:
    from jax.experimental import topologies

    plug_ins = {"tpu": ("libtpu",), "cuda": ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")}[platform]
    if not any(_installed(module) for module in plug_ins):
        raise InputError(f"{wanted}: compiling for it needs {package} (pip install 'mi-jax[plan]')")
    try:
        return list(topologies.get_topology_desc(platform=platform, topology_name=wanted, **options).devices)
    except Exception as error:  # of many classes, none of them documented
        raise InputError(f"no topology {wanted!r} ({str(error).splitlines()[0]}); there are {KNOWN}") from None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
