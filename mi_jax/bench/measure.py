"""Compile times, seconds, memory, and the ceiling that a matrix product sets."""

import collections
import contextlib
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from mi_jax.bench.workloads import Work
from mi_jax.caches import own_programs_dir

CEILING_SIZE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
"""Side of the square matrices whose product is the ceiling: large enough to fill the device."""

CACHE_HIT = "/jax/compilation_cache/cache_hits"
_events: collections.Counter = collections.Counter()


def use_compilation_cache(folder: str | os.PathLike | None = None) -> pathlib.Path:
    """Turns JAX's persistent compilation cache on for every program, however small; returns its folder.

    By default that is what JAX was told (JAX_COMPILATION_CACHE_DIR), else `caches.own_programs_dir`.
    """
    place = folder or jax.config.jax_compilation_cache_dir or own_programs_dir()
    path = pathlib.Path(place).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    compilation_cache.reset_cache()  # it may have been opened elsewhere, or not at all, by an earlier program
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


@contextlib.contextmanager
def _cache_hits() -> Iterator[Callable[[], int]]:
    """How many programs came out of the persistent cache since."""
    if not _events:
        jax.monitoring.register_event_listener(lambda event, **_: _events.update([event]))
        _events["registered"] = 1
    before = _events[CACHE_HIT]
    yield lambda: _events[CACHE_HIT] - before


def compile_work(work: Work) -> tuple[list[Any], dict[str, Any]]:
    """The compiled programs of a work, and the seconds that tracing and compiling took; `from_cache` if no program was
    new to the persistent cache."""
    with _cache_hits() as hits:
        start = time.perf_counter()
        compiled = [function.lower(*arguments).compile() for function, arguments in work.programs]
        seconds = time.perf_counter() - start
        return compiled, {"seconds": round(seconds, 3), "from_cache": hits() >= len(compiled)}


def compile_again(work: Work) -> float:
    """Seconds to trace and compile anew with nothing left but the persistent cache: what the next process pays."""
    jax.clear_caches()
    return compile_work(work)[1]["seconds"]


def time_work(
    work: Work,
    compiled: list[Any],
    repeats: int,
    *,
    between: Callable[[], None] = lambda: None,
    go_on: Callable[[float], bool] = lambda longest: True,
) -> tuple[list[float], list[float]]:
    """Seconds of each of `repeats` runs, after one that does not count, and the processor seconds this process spent.

    On a CPU that other work shares, processor seconds say more than seconds.

    between: done before every run that counts. go_on: asked before each after the first, with the longest so far [s].
    """
    check_finite(work, work.run(*compiled))
    seconds: list[float] = []
    spent: list[float] = []
    while len(seconds) < repeats and (not seconds or go_on(max(seconds))):
        between()
        start, start_spent = time.perf_counter(), time.process_time()
        work.run(*compiled)
        seconds.append(time.perf_counter() - start)
        spent.append(time.process_time() - start_spent)
    return seconds, spent


def check_finite(work: Work, result: Any) -> None:
    """Raises FloatingPointError if a result is not a number: a fast wrong program is not measured."""
    for leaf in jax.tree.leaves(result):
        if not bool(jnp.isfinite(jnp.asarray(leaf)).all()):
            raise FloatingPointError(f"{work.name}: the result is not finite")


def summary(seconds: list[float], spent: list[float], flops: int, ceiling: float) -> dict[str, Any]:
    """Median and least seconds, TFLOP, TFLOP/s and MFU by the median; processor seconds. `ceiling` [FLOP/s]."""
    median = statistics.median(seconds)
    return {
        "seconds": seconds,
        "processor_seconds": spent,
        "median_processor_seconds": round(statistics.median(spent), 5),
        "median_seconds": round(median, 5),
        "least_seconds": round(min(seconds), 5),
        "repeats": len(seconds),
        "tflop": flops / 1e12,
        "tflop_per_second": flops / median / 1e12,
        "mfu": flops / median / ceiling,
    }


def memory(compiled: list[Any]) -> dict[str, int]:
    """Bytes on one device: peak of the process so far where the device counts it, and what the compiler planned for
    the largest program."""
    found = {}
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        found["peak_bytes"] = stats["peak_bytes_in_use"]
    plans = [plan for program in compiled if (plan := program.memory_analysis()) is not None]
    if plans:
        # Donated arguments come back as outputs: they count once.
        size = lambda p: p.argument_size_in_bytes + p.output_size_in_bytes - p.alias_size_in_bytes  # noqa: E731
        plan = max(plans, key=lambda p: size(p) + p.temp_size_in_bytes)
        found["planned_arguments_bytes"] = size(plan)
        found["planned_temporaries_bytes"] = plan.temp_size_in_bytes
    return found


def matmul_ceiling(dtype: jnp.dtype, *, size: int | None = None) -> float:
    """FLOP/s of the best of some rounds of a square matrix product on random data, one device."""
    backend = jax.default_backend()
    size = size or CEILING_SIZE.get(backend, 4096)
    # On a CPU, other work comes and goes: many short rounds meet a quiet moment.
    rounds, calls = (30, 1) if backend == "cpu" else (5, 10)
    a = jnp.asarray(np.random.default_rng(0).standard_normal((size, size), np.float32).astype(dtype))
    b = a.T + 0  # its own buffer
    product = jax.jit(jnp.matmul).lower(a, b).compile()
    jax.block_until_ready(product(a, b))
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        # Calls queue up on the device; the last is done when all are.
        for _ in range(calls):
            out = product(a, b)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - start) / calls)
    return 2 * size**3 / best
