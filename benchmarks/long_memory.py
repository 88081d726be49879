"""Memory and exactness of long videos: `mi-jax animate` in a process of its own, for several lengths.

    python benchmarks/long_memory.py --seconds 60 600 7200 --out benchmarks/results/long_memory.json

The shipped puppet, by default at 32x32 pixels in one step, so that two hours take half an hour: what is held does not
depend on the size of pictures, only how large it is. Read are the process's largest resident memory, seconds of work,
and from the file the number of frames, the times of the last frame and of the sound's end, and whether all frames are
1/25 s apart.
"""

import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import tyro

from mi_jax.data.sound_files import read_audio, write_audio

EXAMPLE = Path(__file__).parents[1] / "mi_jax" / "assets" / "examples"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    out: Path
    seconds: tuple[float, ...] = (60, 600, 7200)
    model: str = "puppet"
    size: int = 32
    steps: int = 1
    order: str = "wavefront"


def made(args: Args, seconds: float, folder: Path) -> dict:
    said = read_audio(EXAMPLE / "speech.wav")
    write_audio(folder / "long.wav", np.tile(said, -(-round(seconds * 16000) // len(said)))[: round(seconds * 16000)])
    out = folder / "out.mp4"
    command = [
        sys.executable, "-m", "mi_jax", "animate", str(EXAMPLE / "portrait.png"), str(folder / "long.wav"),
        "--mask", str(EXAMPLE / "mask.png"), "--prompt", "She is happy.", "--out", str(out), "--model", args.model,
        "--height", str(args.size), "--width", str(args.size), "--steps", str(args.steps), "--order", args.order,
    ]  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    took = time.perf_counter() - start
    if status:
        raise SystemExit(f"animate ended with {os.waitstatus_to_exitcode(status)}")
    with av.open(str(out)) as container:
        times = [float(p.pts * p.time_base) for p in container.demux(video=0) if p.pts is not None]
    with av.open(str(out)) as container:
        ends = [float((p.pts + p.duration) * p.time_base) for p in container.demux(audio=0) if p.pts is not None]
    times = np.sort(times)
    return {
        "seconds": seconds,
        "peak_memory_mb": round(usage.ru_maxrss / 1024),
        "work_s": round(took, 1),
        "frames": len(times),
        "last_frame_s": round(float(times[-1]), 3),
        "sound_ends_s": round(max(ends), 3),
        "even": bool(np.allclose(np.diff(times), 0.04, atol=1e-3)),
        "file_mb": round(out.stat().st_size / 1e6, 2),
    }


def main(args: Args) -> None:
    rows = []
    for seconds in args.seconds:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(made(args, seconds, Path(folder)))
        print(json.dumps(rows[-1]), flush=True)
    report = {
        "rows": rows,
        "args": {key: str(value) for key, value in dataclasses.asdict(args).items()},
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{os.cpu_count()} cores, {platform.machine()}",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main(tyro.cli(Args))
