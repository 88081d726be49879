"""The 13B denoiser on one H100 or H200, once: a velocity in bf16 at 544x544 and 720x720, windows of 33 latent frames.

    python benchmarks/gpu_13b.py OUT [--budget-seconds 100] [--cases 544:cudnn 720:cudnn 544:xla]

Needs jax with CUDA, flax, einops and jaxtyping, and nothing else: no network, no installation. jax 0.11 needs a flax of
0.12.10 or newer.
Writes OUT/gpu_13b.json anew after every case, and prints each line as it is known, so that a run that is cut short
loses only what it had not finished. A case that cannot end within the budget is left out, and said to be.

MFU is against the bf16 matrix product measured at the start of the same run. Weights are random, 26 GB.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
import time

START = time.perf_counter()
# cuBLAS alone: tuning Triton's products at these sizes takes longer than everything else here.
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=false")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from mi_jax.bench import measure  # noqa: E402
from mi_jax.bench.run import about_this_machine  # noqa: E402
from mi_jax.bench.workloads import draw_state, forward_work, presets, with_attention  # noqa: E402
from mi_jax.memory import claim_gpu_memory  # noqa: E402
from mi_jax.models.dit import DiT  # noqa: E402

claim_gpu_memory()

REPEATS = 3
GUESS = {"cudnn": 0.35, "xla": 0.06}
"""Share of the ceiling that a run reaches at least, to say whether it ends in time before one was timed."""
COMPILE_SECONDS = 15.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--budget-seconds", type=float, default=100.0)
    parser.add_argument("--cases", nargs="*", default=["544:cudnn", "720:cudnn", "544:xla"], metavar="SIDE:ATTENTION")
    parser.add_argument("--preset", default="magic-infinite-13b", choices=presets())
    parser.add_argument("--latent-frames", type=int, default=33)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--ceiling-size", type=int, default=None, help="side of the matrices of the ceiling")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "gpu_13b.json"

    def left() -> float:
        return given.budget_seconds - (time.perf_counter() - START)

    result = {
        "arguments": {**vars(given), "out": str(given.out)},
        "machine": about_this_machine(),
        "xla_flags": os.environ["XLA_FLAGS"],
        "cases": [],
    }

    def keep(line: str) -> None:
        print(f"[{time.perf_counter() - START:6.1f} s] {line}", flush=True)
        result["wall_seconds"] = round(time.perf_counter() - START, 1)
        path.write_text(json.dumps(result, indent=1) + "\n")

    keep(f"{result['machine']['device']}, jax {jax.__version__}")
    measure.use_compilation_cache(tempfile.mkdtemp())
    dtype = jnp.dtype(given.dtype)
    ceiling = measure.matmul_ceiling(dtype, size=given.ceiling_size)
    result["matmul_ceiling_tflop_per_second"] = ceiling / 1e12
    keep(f"matmul ceiling {ceiling / 1e12:.0f} TFLOP/s in {given.dtype}")
    preset = dataclasses.replace(presets()[given.preset], latent_frames=given.latent_frames)
    weights = jax.block_until_ready(draw_state(lambda: DiT(preset.dit, rngs=nnx.Rngs(0)), dtype)[1])
    result["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(weights))
    keep(f"{result['parameters']:,} parameters drawn, {json.dumps(measure.memory([]))}")

    rates, timed = {kernel: share * ceiling for kernel, share in GUESS.items()}, []
    for case in given.cases:
        side, _, attention = case.partition(":")
        found = {"case": case}
        result["cases"].append(found)
        try:
            sized = dataclasses.replace(with_attention(preset, attention), height=int(side), width=int(side))
            work = forward_work(sized, batch=1, dtype=dtype, weights=weights)
            found |= {"sizes": work.sizes, "tflop": work.flops / 1e12}
            once = work.flops / rates.get(attention, rates["xla"])
            needed = COMPILE_SECONDS + 2 * once
            if left() < needed:
                found["left_out"] = f"{left():.0f} s left of the budget, about {needed:.0f} s needed"
                keep(f"{case}: left out, {found['left_out']}")
                continue
            compiled, found["compile"] = measure.compile_work(work)
            keep(f"{case}: compiled in {found['compile']['seconds']:.1f} s, {json.dumps(measure.memory(compiled))}")
            if left() < 2 * once:
                found["left_out"] = f"{left():.0f} s left of the budget after compiling"
                keep(f"{case}: left out, {found['left_out']}")
                continue
            seconds, spent = measure.time_work(work, compiled, REPEATS, go_on=lambda longest: left() > 1.1 * longest)
            found |= {**measure.summary(seconds, spent, work.flops, ceiling), **measure.memory(compiled)}
            keep(
                f"{case}: {found['median_seconds']:.3f} s median, {found['least_seconds']:.3f} s least of "
                f"{found['repeats']}, {found['tflop']:.1f} TFLOP, {found['tflop_per_second']:.0f} TFLOP/s, "
                f"MFU {100 * found['mfu']:.1f} % of the ceiling"
            )
            rates[attention] = work.flops / max(seconds) / 1.2
            timed.append((found, work))
            del compiled
        except Exception as fault:
            found["failed"] = f"{type(fault).__name__}: {fault}"[:4000]
            keep(f"{case}: failed, {found['failed'].splitlines()[0][:300]}")
    for found, work in timed:  # last: it costs a trace and reads the cache, and the seconds above are worth more
        if left() < COMPILE_SECONDS:
            break
        try:
            found["compile"]["warm_seconds"] = measure.compile_again(work)
            keep(f"{found['case']}: compiled again from the cache in {found['compile']['warm_seconds']:.1f} s")
        except Exception as fault:
            keep(f"{found['case']}: compiling again failed, {str(fault)[:300]}")
    keep(f"written to {path}")


if __name__ == "__main__":
    main()
