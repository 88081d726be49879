"""Runs `mi-jax animate` where things go wrong, and holds what it says and leaves behind against what it should.

    python benchmarks/reliability/faults.py --out benchmarks/results/faults.json
    python benchmarks/reliability/faults.py --only interrupts --count 5

Each command either writes its whole video and ends with 0, or ends with another code, at most one line of complaint, no
traceback, and nothing beside what was there before.

full: a disk of a few pages, so that the video does not fit. read-only: a file system that takes no file. homeless: no
HOME, and a uid that has no name. closed: stdin, stdout or stderr closed, a reader that goes away, or an output that is
full, whose videos must be there all the same. interrupts: SIGINT or SIGTERM at a random moment; 130 or 143 (128 + the
signal's number) is the exit code. Needs root: small file systems are mounted, and another user runs.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOBODY = 65_533


def prepare(folder: pathlib.Path) -> list[str]:
    """A small model and its inputs; the command that animates them, up to --out."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import numpy as np
    from tiny_avatar import make_avatar, portrait, voice

    from mi_jax.data import pictures, sound_files

    make_avatar().save(folder / "model", dtype=np.float32)
    pictures.write_image(folder / "portrait.png", portrait())
    pictures.write_image(folder / "mask.png", np.full((40, 48), 255, np.uint8))
    sound_files.write_audio(folder / "speech.wav", voice(2.0))
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    files = [str(folder / name) for name in ("portrait.png", "speech.wav")]
    model = ["--model", str(folder / "model"), "--mask", str(folder / "mask.png")]
    return [sys.executable, "-m", "mi_jax", "animate", *files, *model]


def environment(cache: pathlib.Path) -> dict[str, str]:
    kept = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
    return os.environ | kept | {"MI_JAX_CACHE": str(cache), "JAX_COMPILATION_CACHE_DIR": str(cache / "programs")}


def judge(code: int, said: str, place: pathlib.Path, codes: set[int]) -> str | None:
    """What is wrong with an end; None: nothing."""
    lines = said.strip().splitlines()
    if any("Traceback" in line or "Exception ignored" in line for line in lines):
        return f"exit code {code}, a traceback: {lines[-1]}"
    if code not in codes:
        return f"exit code {code}: {lines[-2:]}"
    left = sorted(path.name for path in place.iterdir())
    if code == 0 and left != ["out.mp4"]:
        return f"exit code 0, and there is {left}"
    if code != 0 and left:
        return f"exit code {code}, and left behind: {left}"
    errors = [line for line in lines if line.startswith("mi-jax: error:")]
    if code == 2 and len(errors) != 1:
        return f"exit code 2, and says {lines[-2:]}"
    return None


def tried(command: list[str], place: pathlib.Path, codes: set[int], **options) -> tuple[int, str | None]:
    process = subprocess.Popen(
        [*command, "--out", str(place / "out.mp4")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    _, said = process.communicate(timeout=300)
    return process.returncode, judge(process.returncode, said or "", place, codes)


def full(command, place, cache, rng):
    size = rng.choice([4, 8, 16, 24])
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", place], check=True)
    try:
        return tried(command, place, {2} if size < 16 else {0, 2}, env=environment(cache))
    finally:
        subprocess.run(["umount", place], check=True)


def read_only(command, place, cache, rng):
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place], check=True)
    try:
        return tried(command, place, {2}, env=environment(cache))
    finally:
        subprocess.run(["umount", place], check=True)


def homeless(command, place, cache, rng):
    place.chmod(0o777)
    without = {name: value for name, value in environment(cache).items() if name not in ("HOME", "USER", "LOGNAME")}
    if rng.random() < 0.3:
        without["HOME"] = "/nowhere"
    if rng.random() < 0.5:  # and caches that cannot be
        without |= {"MI_JAX_CACHE": "/proc/nowhere"}
        del without["JAX_COMPILATION_CACHE_DIR"]
    return tried(command, place, {0}, env=without, user=NOBODY, group=NOBODY)


def closed(command, place, cache, rng):
    how = rng.choice(["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "| true", "2>&1 | true", "> /dev/full"])
    quoted = " ".join(f"'{word}'" for word in [*command, "--out", str(place / "out.mp4")])
    script = f"set -o pipefail; {quoted} {how}"
    done = subprocess.run(["bash", "-c", script], env=environment(cache), capture_output=True, text=True, timeout=300)
    expected = {0, 128 + signal.SIGPIPE} if "|" in how else {2} if "full" in how else {0}
    fault = None if done.returncode in expected else f"exit code {done.returncode}"
    fault = fault or judge(0, done.stderr, place, {0})
    return done.returncode, fault and f"{how}: {fault}"


def interrupts(command, place, cache, rng):
    number = rng.choice([signal.SIGINT, signal.SIGTERM])
    process = subprocess.Popen(
        [*command, "--out", str(place / "out.mp4")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(cache),
    )  # fmt: skip
    moment = rng.uniform(0.3, 9)
    time.sleep(moment)
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    # Python itself may still be starting: then the signal ends it as it ends any process.
    fault = judge(process.returncode, said, place, {0, 128 + number, -number})
    return process.returncode, fault and f"{number.name} after {moment:.2f} s: {fault}"


CAMPAIGNS = {
    "full": full, "read-only": read_only, "homeless": homeless, "closed": closed, "interrupts": interrupts,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=CAMPAIGNS)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--out", type=pathlib.Path, help="where the result is added, as JSON")
    given = parser.parse_args()
    results = json.loads(given.out.read_text()) if given.out is not None and given.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        folder.chmod(0o755)
        command = prepare(folder)
        cache = folder / "cache"
        cache.mkdir(mode=0o777)
        cache.chmod(0o777)
        for name in given.only or CAMPAIGNS:
            rng, counts, faults, start = random.Random(given.seed), Counter(), [], time.perf_counter()
            for number in range(given.count):
                place = folder / f"{name}{number}"
                place.mkdir()
                code, fault = CAMPAIGNS[name](command, place, cache, rng)
                counts[f"exit code {code}"] += 1
                if fault is not None:
                    faults.append(fault)
                shutil.rmtree(place)
            seconds = round(time.perf_counter() - start)
            results[name] = {"runs": given.count, **counts, "faults": faults, "seed": given.seed, "seconds": seconds}
            print(f"{name}: {results[name]}", flush=True)
            if given.out is not None:
                given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
