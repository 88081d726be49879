"""One bench, from its options to its result."""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
import re
import statistics
from collections.abc import Callable
from typing import Annotated, Any, Literal

import flax
import jax
import jax.numpy as jnp

from mi_jax.bench import measure, rival, workloads
from mi_jax.bench.workloads import Preset, Work
from mi_jax.bounds import Batch, LatentFrames, Pixels, SamplingSteps, Within, check_fields
from mi_jax.errors import InputError
from mi_jax.files import written_beside
from mi_jax.models.attention import Implementation
from mi_jax.sample.windows import plan_windows

What = Literal["dit", "step", "vae", "sampler"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured. None takes the preset's size, and float32 on a CPU, else bfloat16.

    height, width: pixels. steps, window, overlap, group: of the sampler (`mi_jax.sample.sliding_window`).
    compiled_rival: PyTorch's torch.compile for the rival.
    """

    what: What
    preset: str = "puppet"
    height: Pixels | None = None
    width: Pixels | None = None
    latent_frames: LatentFrames | None = None
    batch: Batch = 1
    dtype: Literal["float32", "bfloat16"] | None = None
    attention: Implementation = "auto"
    repeats: Annotated[int, Within(1, 10**6)] = 5
    against: Literal["diffusers"] | None = None
    compiled_rival: bool = False
    steps: SamplingSteps | None = None
    window: LatentFrames = 33
    overlap: LatentFrames = 8
    group: Annotated[int, Within(1, 10_000)] = 1

    def __post_init__(self):
        check_fields(self)

    def sized_preset(self) -> Preset:
        """The preset with these sizes.

        Raises:
          InputError: no such preset, or numbers that nothing can be measured with.
        """
        known = workloads.presets()
        if self.preset not in known:
            raise InputError(f"no preset {self.preset!r}; there are {', '.join(known)}")
        changes = {name: getattr(self, name) for name in ("height", "width", "latent_frames", "steps")}
        changes = {name: value for name, value in changes.items() if value is not None}
        preset = workloads.with_attention(dataclasses.replace(known[self.preset], **changes), self.attention)
        grid = (workloads.latent_grid if self.what == "vae" else workloads.token_grid)(preset)
        if self.what == "sampler":
            plan_windows(grid[0], self.window, self.overlap)
        return preset


def bench(options: Options, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measures one thing and returns a record of it that JSON can hold; `say` gets lines for people as they are known.

    Seconds, TFLOP by formula, TFLOP/s, MFU against a matrix product measured in the same run, memory, compile times;
    with a rival, its seconds, run alternately with ours, and the ratio.

    Raises:
      InputError: options that cannot be measured, among them a model that this device cannot hold.
    """
    preset = options.sized_preset()
    if options.against is not None:
        rival.check(options.what, preset)
    accelerated = jax.default_backend() != "cpu"
    dtype = jnp.dtype(options.dtype or ("bfloat16" if accelerated else "float32"))
    if options.attention == "cudnn" and (jax.default_backend() != "gpu" or dtype == jnp.float32):
        raise InputError("attention cudnn needs an NVIDIA GPU and bfloat16")
    with contextlib.suppress(OSError):  # it cannot be written there: then every program is compiled
        measure.use_compilation_cache()
    ceiling = measure.matmul_ceiling(dtype)
    machine = about_this_machine()
    say(f"{machine['device']}, {dtype.name}: a matrix product reaches {ceiling / 1e12:.3g} TFLOP/s")
    record = {
        "what": options.what,
        "preset": options.preset,
        "dtype": dtype.name,
        "attention": options.attention,
        "machine": machine,
        "matmul_ceiling_tflop_per_second": ceiling / 1e12,
        "results": [],
    }
    try:
        for work in _works(options, preset, dtype):
            result = _measure(work, options, preset, dtype, ceiling)
            record["results"].append(result)
            for line in lines_for_people(result):
                say(line)
    except jax.errors.JaxRuntimeError as fault:
        if "RESOURCE_EXHAUSTED" not in str(fault):
            raise
        raise InputError(f"{options.what} of {options.preset} does not fit into {machine['device']}") from fault
    return record


def _works(options: Options, preset: Preset, dtype: jnp.dtype) -> list[Work]:
    match options.what:
        case "dit":
            return [workloads.forward_work(preset, batch=options.batch, dtype=dtype)]
        case "step":
            return [workloads.step_work(preset, batch=options.batch, dtype=dtype)]
        case "vae":
            return workloads.vae_works(preset, batch=options.batch, dtype=dtype)
        case "sampler":
            sizes = {name: getattr(options, name) for name in ("batch", "window", "overlap", "group")}
            return [workloads.sampler_work(preset, dtype=dtype, **sizes)]


def _measure(work: Work, options: Options, preset: Preset, dtype: jnp.dtype, ceiling: float) -> dict[str, Any]:
    compiled, compiling = measure.compile_work(work)
    result: dict[str, Any] = {"work": work.name, "sizes": work.sizes}
    if options.against is None:
        times = measure.time_work(work, compiled, options.repeats)
    else:
        task = rival.spec(options.what, preset, batch=options.batch, dtype=dtype, compile=options.compiled_rival)
        with rival.Rival(task) as other:
            times = measure.time_work(work, compiled, options.repeats, between=other.run)
            theirs = other.seconds, other.processor_seconds
            ratio, spent = (statistics.median(b / a for a, b in zip(*pair)) for pair in zip(times, theirs))
            result["against"] = {
                "rival": "diffusers",
                **other.about,
                **measure.summary(*theirs, work.flops, ceiling),
                "times_as_long": ratio,
                "times_the_processor_seconds": spent,
            }
    result |= {**measure.summary(*times, work.flops, ceiling), "memory": measure.memory(compiled)}
    del compiled
    return result | {"compile": compiling | {"warm_seconds": measure.compile_again(work)}}


def lines_for_people(result: dict[str, Any]) -> list[str]:
    """A result in a few lines."""
    sizes = result["sizes"]
    shape = f"{sizes['batch']} x {sizes['frames']} frames of {sizes['height']}x{sizes['width']}"
    if "video_tokens" in sizes:
        shape += f", {sizes['video_tokens']} + {sizes['text_tokens']} tokens"
    if "steps" in sizes:
        shape += f", {sizes['steps']} steps x {sizes['windows']} windows x {sizes['branches']} branches"
    compiling = result["compile"]
    first = "from the cache" if compiling["from_cache"] else "cold"
    memory = ", ".join(
        f"{name.replace('_bytes', '').replace('_', ' ')} {_size(n)}" for name, n in result["memory"].items()
    )
    lines = [
        f"{result['work']}: {shape}",
        f"  {result['median_seconds']:.4g} s median, {result['least_seconds']:.4g} s least of {result['repeats']}; "
        f"{result['tflop']:.4g} TFLOP, {result['tflop_per_second']:.3g} TFLOP/s, MFU {100 * result['mfu']:.1f} %",
        f"  compiled in {compiling['seconds']:.2f} s ({first}), in {compiling['warm_seconds']:.2f} s again",
        f"  memory: {memory}",
    ]
    if "against" in result:
        other = result["against"]
        lines.append(
            f"  {other['rival']} {other['diffusers']}, torch {other['torch']}: {other['median_seconds']:.4g} s median; "
            f"{other['times_as_long']:.3g} x our seconds, {other['times_the_processor_seconds']:.3g} x the processor's"
        )
    return lines


def _size(count: int) -> str:
    step = min(int(math.log(max(count, 1), 1024)), 3)
    return f"{count / 1024**step:.4g} {('B', 'KiB', 'MiB', 'GiB')[step]}"


def write(record: dict[str, Any], folder: str | os.PathLike) -> pathlib.Path:
    """Writes the record as JSON into `folder`, under a name of date, device, work and preset; returns the file.

    Raises:
      InputError: the folder cannot be written.
    """
    machine = record["machine"]
    parts = [
        machine["date"][:16].replace(":", ""),
        machine["device"],
        record["what"],
        record["preset"],
        record["dtype"],
    ]
    path = open_folder(folder) / f"{'_'.join(_slug(part) for part in parts)}.json"
    try:
        with written_beside(path) as beside:
            beside.write_text(json.dumps(record, indent=1) + "\n")
    except OSError as fault:
        raise InputError(f"{path}: cannot be written: {fault.strerror}") from fault
    return path


def open_folder(folder: str | os.PathLike) -> pathlib.Path:
    """The folder, made if need be; asked for before anything is measured.

    Raises:
      InputError: it cannot be written to.
    """
    path = pathlib.Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise InputError(f"{path}: cannot be written: {fault.strerror}") from fault
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: cannot be written")
    return path


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(\w+\)", "", text.lower())).strip("-")


def about_this_machine() -> dict[str, Any]:
    """What a measurement is of: device, software and date (UTC)."""
    device = jax.devices()[0]
    cpu = _cpu_name()
    return {
        "device": cpu if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "cpu": cpu,
        "cores": rival.cores(),
        "jax": jax.__version__,
        "flax": flax.__version__,
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
