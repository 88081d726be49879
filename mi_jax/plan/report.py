"""A plan: what one step takes of the machine, in memory, arithmetic and traffic, and the least time that leaves."""

import collections
import dataclasses
import json
import math
import re
from typing import Any

import jax

from mi_jax.errors import InputError
from mi_jax.plan import links
from mi_jax.plan.hlo import KINDS, read_traffic
from mi_jax.plan.topologies import GIB, Topology

_OPTIONS = {
    "cpu": {"xla_backend_optimization_level": 0},  # nothing will run: three times as fast, and of the same memory
    # XLA chooses among kernels by timing them, which needs the GPU. Of products cuBLAS takes any shape, Triton not.
    "cuda": {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device. Outputs that take the place of donated arguments are `aliased` and count once.

    temporaries: None where the compiler gave up before it had laid them out; `peak` is then what it wanted.
    """

    arguments: int
    outputs: int | None
    aliased: int | None
    temporaries: int | None
    peak: int
    available: int

    @property
    def fits(self) -> bool:
        return self.peak <= self.available


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moved:
    """Collectives of one kind over one span. bytes: received by a device in a step (it sends as many)."""

    kind: str
    devices: int
    span: str
    times: int
    bytes: float
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One step of a program on a topology. Seconds are lower bounds: each resource alone, at its maker's peak.

    model_flops: of all devices, without recomputation; executed_flops: with it, of one device; None where there is no
    formula. parameters: of a training step, those that each turn trains, and those that none does. calls: how often the
    program is run for a video of so many seconds (`video_seconds`). hbm: bytes that one
    device reads and writes. hbm and moved are None of a program that was too large to be laid out.
    """

    program: str
    topology: str
    device: str
    devices: int
    data: int
    seq: int
    memory: Memory
    model_flops: float | None
    executed_flops: float | None
    peak_flops: float
    hbm: float | None
    hbm_bandwidth: float
    moved: tuple[Moved, ...] | None
    unknown_loops: int
    source: str
    parameters: dict[str, int] = dataclasses.field(default_factory=dict)
    calls: int | None = None
    video_seconds: float | None = None

    @property
    def compute_seconds(self) -> float | None:
        return None if self.executed_flops is None else self.executed_flops / self.peak_flops

    @property
    def hbm_seconds(self) -> float | None:
        return None if self.hbm is None else self.hbm / self.hbm_bandwidth

    @property
    def link_seconds(self) -> float | None:
        return None if self.moved is None else math.fsum(m.seconds for m in self.moved)

    @property
    def overlapped_seconds(self) -> float:
        """Were everything done at the same time: the slowest resource alone."""
        return max(self.compute_seconds or 0.0, self.hbm_seconds or 0.0, self.link_seconds or 0.0)

    @property
    def serial_seconds(self) -> float:
        """Were nothing of the traffic between devices hidden behind the rest."""
        return max(self.compute_seconds or 0.0, self.hbm_seconds or 0.0) + (self.link_seconds or 0.0)

    def mfu(self, seconds: float) -> float | None:
        """Share of the devices' peak that goes into the model, at so many seconds a step."""
        return None if self.model_flops is None else self.model_flops / (self.devices * self.peak_flops * seconds)

    def as_json(self) -> dict[str, Any]:
        names = ("compute_seconds", "hbm_seconds", "link_seconds", "overlapped_seconds", "serial_seconds")
        derived = {name: getattr(self, name) for name in names}
        derived |= {
            "mfu_ceiling": self.mfu(self.overlapped_seconds),
            "mfu_without_overlap": self.mfu(self.serial_seconds),
            "fits": self.memory.fits,
        }
        return json.loads(json.dumps(dataclasses.asdict(self) | derived))

    def _parameters(self) -> str:
        return ", ".join(f"{name} {count:,}" for name, count in self.parameters.items())

    def table(self) -> str:
        memory, gib = self.memory, lambda n: f"{n / GIB:8.2f} GiB"
        short = (memory.peak - memory.available) / GIB
        verdict = f"fits, {-short:.2f} GiB are left" if memory.fits else f"DOES NOT FIT: {short:.2f} GiB too many"
        rows = [
            f"{self.program} on {self.topology}: {self.devices} x {self.device}, data={self.data} x seq={self.seq}",
            *([f"parameters: {self._parameters()}"] if self.parameters else []),
            "",
            "memory of a device",
            f"  arguments             {gib(memory.arguments)}",
        ]
        if memory.temporaries is not None:
            rows += [
                f"  outputs               {gib(memory.outputs)}   {memory.aliased / GIB:.2f} GiB in place of arguments",
                f"  temporaries           {gib(memory.temporaries)}",
            ]
        rows += [f"  peak                  {gib(memory.peak)}   of {memory.available / GIB:.2f} GiB: {verdict}", ""]
        if self.model_flops is not None:
            rows += [
                "arithmetic",
                f"  model                 {self.model_flops / 1e15:8.2f} PFLOP for the step, by formula",
                f"  executed              {self.executed_flops / 1e15:8.2f} PFLOP by each device, with recomputation",
            ]
        if self.hbm is None or self.moved is None:
            return "\n".join(rows)
        rows += [f"  main memory           {self.hbm / 1e9:8.0f} GB read and written by a device", ""]
        if self.moved:
            rows += ["between devices", f"  {'':20}{'devices':>8} {'over':13}{'times':>6} {'GB received':>12} {'s':>8}"]
            for m in self.moved:
                moved = f"{m.bytes / 1e9:12.2f} {m.seconds:8.3f}"
                rows.append(f"  {m.kind:20}{m.devices:8d} {m.span:13}{m.times:6d} {moved}")
            rows.append("")
        if self.unknown_loops:
            rows += [f"  ({self.unknown_loops} loops of unknown length are counted once)", ""]
        mfu = lambda seconds: "" if self.model_flops is None else f"   MFU {self.mfu(seconds):.1%}"  # noqa: E731
        rows.append("least seconds for the step, at the makers' peak numbers")
        if self.compute_seconds is not None:
            rows.append(f"  arithmetic            {self.compute_seconds:8.3f}")
        rows += [
            f"  main memory           {self.hbm_seconds:8.3f}",
            f"  between devices       {self.link_seconds:8.3f}",
            f"  all at the same time  {self.overlapped_seconds:8.3f}{mfu(self.overlapped_seconds)}: the ceiling",
            f"  links not hidden      {self.serial_seconds:8.3f}{mfu(self.serial_seconds)}",
        ]
        if self.calls is not None:
            least, most = (self.calls * x for x in (self.overlapped_seconds, self.serial_seconds))
            rows += [
                "",
                f"{self.video_seconds:.2f} s of video take it {self.calls:,} times",
                f"  at least              {_duration(least)}, {least / self.video_seconds:.3g} s for a second",
                f"  links not hidden      {_duration(most)}, {most / self.video_seconds:.3g} s for a second",
            ]
        return "\n".join(rows)


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2f} s"


def make_plan(
    program: str,
    lowered: jax.stages.Lowered,
    arguments: Any,
    topology: Topology,
    shape: tuple[int, int],
    *,
    model_flops: float | None,
    executed_flops: float | None,
) -> Plan:
    """Compiles `lowered` for the topology and reads the result; to be called inside the mesh's context.

    arguments: the abstract arrays it was lowered for. shape: (data, seq) of the mesh. executed_flops: of all devices.

    Raises:
      InputError: it does not compile, for another reason than that it does not fit.
    """
    devices, kind = len(topology.devices), topology.kind
    known = {
        "program": program,
        "topology": topology.name,
        "device": kind.name,
        "devices": devices,
        "data": shape[0],
        "seq": shape[1],
        "model_flops": model_flops,
        "executed_flops": executed_flops and executed_flops / devices,
        "peak_flops": kind.flops,
        "hbm_bandwidth": kind.hbm,
        "source": kind.source,
    }
    try:
        compiled = lowered.compile(compiler_options=_OPTIONS.get(topology.platform))
    except jax.errors.JaxRuntimeError as error:
        memory = _refused(str(error), _bytes_of(arguments), kind.usable)
        return Plan(**known, memory=memory, hbm=None, moved=None, unknown_loops=0)
    analysis = compiled.memory_analysis()
    outputs, aliased = analysis.output_size_in_bytes, analysis.alias_size_in_bytes
    memory = Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=outputs,
        aliased=aliased,
        temporaries=analysis.temp_size_in_bytes,
        peak=analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + outputs - aliased,
        available=kind.usable,
    )
    traffic = read_traffic(compiled.as_text(), devices)
    groups = collections.defaultdict(list)
    for collective in traffic.collectives:
        groups[collective.kind, len(collective.group), links.span(collective, topology)].append(collective)
    moved = tuple(
        Moved(
            kind=key[0],
            devices=key[1],
            span=key[2],
            times=sum(c.times for c in collectives),
            bytes=math.fsum(c.received for c in collectives),
            seconds=math.fsum(links.seconds(c, topology) for c in collectives),
        )
        for key, collectives in sorted(groups.items(), key=lambda item: (KINDS.index(item[0][0]), item[0][1]))
    )
    return Plan(**known, memory=memory, hbm=traffic.hbm, moved=moved, unknown_loops=traffic.unknown_loops)


def _refused(message: str, arguments: int, available: int) -> Memory:
    """What a program wanted that the compiler (TPU's) refuses because it does not fit.

    Raises:
      InputError: it is refused for another reason.
    """
    size = r"([\d.]+)([KMGT])"
    # The second calls "temporaries" what holds arguments and outputs too.
    forms = (rf"Used {size} of {size} hbm", rf"memory required for [^(]*\({size}\) exceeds available HBM \({size}\)")
    found = re.search(forms[0], message) or re.search(forms[1], message)
    if found is None:
        raise InputError(f"does not compile: {message.splitlines()[0]}") from None
    wanted, there = (round(float(found[i]) * 1024 ** (1 + "KMGT".index(found[i + 1]))) for i in (1, 3))
    return Memory(
        arguments=arguments,
        outputs=None,
        aliased=None,
        temporaries=None,
        peak=wanted,
        available=min(there, available),
    )


def _bytes_of(tree: Any) -> int:
    """Of one device's share of abstract arrays."""
    shards = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))
    return sum(math.prod(shape) * size for shape, size in shards)
