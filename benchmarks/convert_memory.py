"""Memory and time of converting a large checkpoint, and of loading it, on a synthetic denoiser.

    python benchmarks/convert_memory.py [--gigabytes 3] [--shards 3] [--folder /tmp]

Writes a denoiser of full width in diffusers' layout (noise in bf16, split over files), converts it in a process of its
own whose peak resident memory is read at the end, and loads the result in another, beside a plain read of the same
bytes. Says PASS if the conversion's peak, imports and all, stays below 1.3 times the largest source file. Everything it
wrote is deleted. It costs twice the size on disk.
"""

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

WIDTH, HEADS, TEXT = 3072, 24, 4096


def sizes(gigabytes: float) -> dict:
    """A config of `HunyuanVideoTransformer3DModel` of about this size in bf16: fewer blocks, all of full width."""
    double, pair, rest = 0.68, 0.57, 0.75  # gigabytes of a double block, of two single blocks, of the others
    blocks = max(1, round((gigabytes - rest) / (double + pair)))
    return {
        "in_channels": 16, "out_channels": 16, "num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS,
        "num_layers": blocks, "num_single_layers": 2 * blocks, "num_refiner_layers": 2, "mlp_ratio": 4.0,
        "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True, "text_embed_dim": TEXT,
        "pooled_projection_dim": 768, "rope_theta": 256.0, "rope_axes_dim": [16, 56, 56], "image_condition_type": None,
    }  # fmt: skip


def write_source(folder: pathlib.Path, config: dict, shards: int) -> int:
    """The checkpoint; returns the bytes of its largest file. Needs no PyTorch, and the memory of one tensor."""
    from flax import nnx

    from mi_jax.models.dit import DiT, DiTConfig
    from mi_jax.weights.hunyuan_video import diffusers_table
    from mi_jax.weights.rows import leaf_shapes, plan

    dit = DiTConfig(
        double_depth=config["num_layers"], single_depth=config["num_single_layers"], guidance_embedding=True
    )
    shapes = leaf_shapes(lambda: DiT(dit, rngs=nnx.Rngs(0)))
    tensors = {}
    for row in plan(shapes, diffusers_table(dit)):
        shape = shapes[row.leaf] if row.index is None else shapes[row.leaf][1:]
        outputs = shape[-1] // len(row.sources)
        source = (outputs, *shape[:-1]) if row.leaf.endswith("kernel") else (outputs,)
        if row.leaf == "image_in.kernel":
            source = (WIDTH, 16, 1, 2, 2)
        tensors |= dict.fromkeys(row.sources, source)
    total = sum(2 * int(np.prod(shape)) for shape in tensors.values())
    files, size = [[]], 0
    for name, shape in tensors.items():
        if size > total / shards:
            files.append([])
            size = 0
        files[-1].append(name)
        size += 2 * int(np.prod(shape))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    weight_map, largest = {}, 0
    noise = np.random.default_rng(0).integers(0x3C00, 0x3D00, 2**20, np.uint16)  # bf16 around 0.01
    for i, names in enumerate(files, start=1):
        path = folder / f"diffusion_pytorch_model-{i:05d}-of-{len(files):05d}.safetensors"
        header, end = {}, 0
        for name in names:
            count = 2 * int(np.prod(tensors[name]))
            header[name] = {"dtype": "BF16", "shape": tensors[name], "data_offsets": [end, end + count]}
            end += count
        packed = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(packed).to_bytes(8, "little") + packed)
            for name in names:
                file.write(np.resize(noise, int(np.prod(tensors[name]))).tobytes())
        weight_map |= dict.fromkeys(names, path.name)
        largest = max(largest, path.stat().st_size)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return largest


def measure(step: str, *paths: pathlib.Path) -> dict:
    """Runs `step` in a process of its own: seconds on the clock and of CPU, and peak resident bytes."""
    run = subprocess.run(
        [sys.executable, __file__, "--step", step, *map(str, paths)], check=True, capture_output=True, text=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def run_step(step: str, paths: list[str]) -> None:
    import jax.numpy as jnp

    from mi_jax.avatar.families import convert
    from mi_jax.avatar.folders import load_part

    start, cpu = time.perf_counter(), time.process_time()
    if step == "convert":
        convert("hunyuan-video", paths[0], paths[1])
    elif step == "load":
        load_part(paths[0], "dit", dtype=jnp.bfloat16)
    elif step == "read":
        for path in pathlib.Path(paths[0]).glob("*.safetensors"):
            np.fromfile(path, np.uint8)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    # Not getrusage: that maximum is inherited from the parent across fork and exec.
    status = pathlib.Path("/proc/self/status").read_text()
    if "VmHWM" in status:
        peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--folder", default=None)
    parser.add_argument("--step", choices=["import", "convert", "load", "read"], help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        run_step(args.step, args.paths)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        source, out = pathlib.Path(scratch) / "source", pathlib.Path(scratch) / "out"
        largest = write_source(source, sizes(args.gigabytes), args.shards)
        total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        bare = measure("import")
        converted = measure("convert", source, out)
        measure("read", out)  # the same warm cache for both that follow
        read, loaded = measure("read", out), measure("load", out)
    gigabyte = 1e9
    above = converted["peak"] - bare["peak"]
    print(f"source: {total / gigabyte:.2f} GB, largest file {largest / gigabyte:.2f} GB")
    print(
        f"convert: {converted['seconds']:.1f} s ({converted['cpu']:.1f} s of CPU), peak "
        f"{converted['peak'] / gigabyte:.2f} GB ({converted['peak'] / largest:.2f} x the largest file), of which "
        f"{bare['peak'] / gigabyte:.2f} GB imports and {above / gigabyte:.2f} GB the conversion"
    )
    print(
        f"load: {loaded['seconds']:.1f} s ({loaded['cpu']:.1f} s of CPU), a plain read of the same bytes "
        f"{read['seconds']:.1f} s ({read['cpu']:.1f} s of CPU)"
    )
    print("PASS" if converted["peak"] < 1.3 * largest else "FAIL", "peak below 1.3 x the largest source file")


if __name__ == "__main__":
    main()
