"""How long collectives take on a topology's links, by the bandwidth of the best known algorithms.

GPUs: NVLink joins those of a host, every GPU's own port of the network the hosts; a collective over m GPUs in each of
several hosts moves 1 / m of what leaves a host through each port, beside what NVLink moves inside (NCCL's rails).
TPUs: a torus; a group that varies along some of its axes uses the links of all of them. An axis closes into a ring
where it is a whole number of cubes of 4 (v5p, v7x) or the pod's full 16 (v6e).
"""

import math

from mi_jax.plan.hlo import Collective
from mi_jax.plan.topologies import Topology


def span(collective: Collective, topology: Topology) -> str:
    """Where a collective's bytes go: "in host", "25 hosts", or the sides of the torus that its group covers."""
    if topology.kind.is_torus:
        sides = [str(n) for n, _ in _sides(collective, topology) if n > 1]
        return "torus " + "x".join(sides) if sides else "on chip"
    hosts = len({_host(topology, i) for i in collective.group})
    return f"{hosts} hosts" if hosts > 1 else "in host"


def seconds(collective: Collective, topology: Topology) -> float:
    """Of all its runs, alone on the links, latency not counted."""
    return _torus_seconds(collective, topology) if topology.kind.is_torus else _gpu_seconds(collective, topology)


def _host(topology: Topology, partition: int) -> int:
    return (
        partition // topology.kind.per_host if topology.platform == "cpu" else topology.devices[partition].process_index
    )


def _gpu_seconds(collective: Collective, topology: Topology) -> float:
    kind = topology.kind
    hosts = len({_host(topology, i) for i in collective.group})
    inside = collective.received / kind.link
    if hosts == 1:
        return inside
    rails = len(collective.group) // hosts
    outside = collective.times * collective.size * (hosts - 1) / hosts / kind.network
    if collective.kind == "collective-permute":
        outside = collective.received / kind.network
    elif collective.kind == "all-reduce":
        outside *= 2 / rails
    elif collective.kind != "all-to-all":  # of which every device's own bytes leave by its own port
        outside /= rails
    return max(inside if rails > 1 else 0.0, outside)


def _sides(collective: Collective, topology: Topology) -> list[tuple[int, bool]]:
    """Devices of a group along each axis of the torus, and whether that axis is a ring."""
    everywhere = [device.coords for device in topology.devices]
    here = [topology.devices[i].coords for i in collective.group]
    whole = 16 if topology.kind.name == "TPU v6e" else 4
    found = []
    for axis in range(len(everywhere[0])):
        length = len({coords[axis] for coords in everywhere})
        n = len({coords[axis] for coords in here})
        found.append((n, n == length and length % whole == 0))
    return found


def _torus_seconds(collective: Collective, topology: Topology) -> float:
    sides = [(n, ring) for n, ring in _sides(collective, topology) if n > 1]
    link = topology.kind.link
    if not sides:
        return 0.0  # the two halves of a v7x chip
    if collective.kind == "all-to-all":
        # Bytes x hops over the links of an axis: a quarter of a ring on average, its bisection on a line.
        local = collective.times * collective.size
        return max(n * local / ((8 if ring else 4) * link) for n, ring in sides)
    if collective.kind == "collective-permute":
        return collective.received / link
    return collective.received / (link * math.fsum(2 if ring else 1 for _, ring in sides))
