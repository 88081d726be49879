"""Kills, damages and starves trainings, and holds what comes of them against an unbroken one, bit for bit.

    python benchmarks/reliability/kills.py --out benchmarks/results/kills.json
    python benchmarks/reliability/kills.py --only damage --count 20

kills: SIGKILL at random moments of one run after the other, also while a checkpoint is written; each run goes on until
it ends. damage: the newest checkpoint of a run is cut short, damaged at a random place, loses a file, or is removed;
the run must go on from an older one and say so. full: the disk is full when a checkpoint is written (a
limit on the size of files where no small file system can be mounted). two: a second trainer in the same folder is
refused.
"""

import argparse
import csv
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXPERIMENT = """
import dataclasses, sys, time
sys.path[:0] = [{tests!r}]
import tiny_training

class Slow(tiny_training.Regression):
    def dataset(self, seed, share=0, shares=1):
        def wait(x):
            time.sleep({pause})
            return x
        return super().dataset(seed, share, shares).map(wait)

config = tiny_training.config(
    Slow(width={width}), steps={steps}, log_every=1, checkpoint_every=5, sample_every=0, workers=0
)
"""
STEPS = 160


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}


class Runs:
    """A folder of trainings of one experiment, and what an unbroken one ends with."""

    def __init__(self, folder: pathlib.Path, steps: int = STEPS, pause: float = 0.02, width: int = 16):
        self.folder = folder
        self.experiment = folder / f"experiment{steps}_{width}.py"
        text = EXPERIMENT.format(tests=str(ROOT / "tests"), steps=steps, pause=pause, width=width)
        self.experiment.write_text(text)

    def start(self, out: pathlib.Path, **options) -> subprocess.Popen:
        command = [sys.executable, "-m", "mi_jax", "train", str(self.experiment), "--out", str(out)]
        return subprocess.Popen(
            command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )

    def finish(self, out: pathlib.Path) -> tuple[int, str]:
        process = self.start(out)
        _, said = process.communicate(timeout=600)
        return process.returncode, said


def prints(out: pathlib.Path) -> dict:
    """The fingerprints of every leaf of the newest checkpoint, and the losses of every step."""
    newest = max((p for p in (out / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    from orbax.checkpoint import v1 as ocp

    notes = ocp.metadata(newest).custom_metadata
    with (out / "metrics.csv").open() as file:
        losses = [(int(row["step"]), row["loss"]) for row in csv.DictReader(file)]
    return {"step": int(newest.name), "leaves": notes["fingerprints"], "losses": losses}


def kills(folder: pathlib.Path, count: int, rng: random.Random) -> dict:
    runs = Runs(folder)
    code, said = runs.finish(folder / "whole")
    assert code == 0, said
    whole = prints(folder / "whole")
    counts, faults, number = Counter(), [], 0
    while counts["kills"] < count:
        number += 1
        out = folder / f"run{number}"
        for _ in range(rng.randint(3, 9)):
            begun = step_of(out)
            if begun >= STEPS - 1:
                break
            process = runs.start(out)
            if rng.random() < 0.8:  # about a step of its training; else at any moment of its start
                target = rng.randint(begun, STEPS - 1)
                while step_of(out) <= target and process.poll() is None:
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 0.3))
            else:
                time.sleep(rng.uniform(0.5, 5))
            if process.poll() is not None:
                process.communicate()
                break
            process.send_signal(signal.SIGKILL)
            process.communicate()
            counts["kills"] += 1
            counts["half-written checkpoints"] += any(
                "tmp" in path.name for path in (out / "checkpoints").glob("*") if path.is_dir()
            )
            counts["before the first step"] += step_of(out) == begun
            counts["after step 100"] += step_of(out) > 100
        code, said = runs.finish(out)
        counts["runs"] += 1
        if code != 0:
            faults.append(f"run {number}: exit code {code}: {said.strip().splitlines()[-1:]}")
        elif prints(out) == whole:
            counts["bitwise as the unbroken run"] += 1
        else:
            faults.append(f"run {number}: not as the unbroken run")
        shutil.rmtree(out)
        print(dict(counts), faults, flush=True)
    return {**counts, "faults": faults}


def step_of(out: pathlib.Path) -> int:
    try:
        with (out / "metrics.csv").open() as file:
            return max((int(row["step"]) for row in csv.DictReader(file)), default=0)
    except (OSError, ValueError, TypeError, KeyError):
        return 0


def damage(folder: pathlib.Path, count: int, rng: random.Random) -> dict:
    """In process: a start costs more than what is tried."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import logging

    import tiny_training

    from mi_jax.errors import InputError
    from mi_jax.train.loop import train

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("mi_jax").addHandler(handler)
    settings = {"checkpoint_every": 5, "sample_every": 0, "workers": 0, "log_every": 5}
    train(tiny_training.config(tiny_training.Regression(), steps=20, **settings), folder / "begun")
    longer = tiny_training.config(tiny_training.Regression(), steps=25, **settings)
    shutil.copytree(folder / "begun", folder / "whole")
    train(longer, folder / "whole")
    whole, counts, faults = prints(folder / "whole"), Counter(), []
    for number in range(count):
        out = folder / f"damaged{number}"
        shutil.copytree(folder / "begun", out)
        newest = out / "checkpoints" / "20"
        files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
        file = rng.choice(files)
        what = rng.choice(["cut short", "a file less", "removed"] + ["another byte"] * 7)
        if what == "removed":
            shutil.rmtree(newest)
        elif what == "a file less":
            file.unlink()
        else:
            data = bytearray(file.read_bytes())
            place = rng.randrange(max(1, len(data)))
            if what == "cut short":
                data = data[:place]
            elif data:
                data[place] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
        said.clear()
        try:
            train(longer, out)
        except InputError as fault:
            faults.append(f"{what} ({file.name}): refused: {fault}")
            continue
        except Exception as fault:
            faults.append(f"{what} ({file.name}): {type(fault).__name__}: {str(fault)[:200]}")
            continue
        older = any("damaged, an older checkpoint is looked for" in line for line in said)
        counts[what] += 1
        counts["an older one taken, and said" if older else "taken up as it is"] += 1
        if prints(out) != whole:
            faults.append(f"{what} ({file.relative_to(newest)}): ended otherwise than the unbroken run")
        shutil.rmtree(out)
    return {**counts, "damages": count, "faults": faults}


def full(folder: pathlib.Path, count: int, rng: random.Random) -> dict:
    """A checkpoint that does not fit: one line, exit code 2, and those before stay whole."""
    counts, faults = Counter(), []
    for number in range(count):
        place = folder / f"disk{number}"
        place.mkdir()
        size = rng.randint(1500, 9000)  # KiB; a checkpoint takes about 2,500
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", place], capture_output=True)
        is_disk = mounted.returncode == 0
        runs = Runs(folder, steps=30, pause=0.0, width=32_000)
        limit = None if is_disk else partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size * 100, size * 100))
        try:
            process = runs.start(place / "run", preexec_fn=limit)
            _, said = process.communicate(timeout=300)
            lines = said.strip().splitlines()
            errors = [line for line in lines if line.startswith("mi-jax: error:")]
            counts["small disks" if is_disk else "limits on files"] += 1
            counts[f"exit code {process.returncode}"] += 1
            if process.returncode not in (0, 2) or (process.returncode == 2 and len(errors) != 1):
                faults.append(f"{size} KiB: exit code {process.returncode}: {lines[-2:]}")
            elif any(line.startswith("Traceback") for line in lines):
                faults.append(f"{size} KiB: a traceback before: {errors}")
            if any(path.name.isdigit() for path in (place / "run" / "checkpoints").glob("*")):
                counts["with a checkpoint from before"] += 1
                command = [sys.executable, "-m", "mi_jax", "check", str(place / "run")]
                checked = subprocess.run(command, env=environment(), capture_output=True, text=True)
                if checked.returncode != 0:
                    faults.append(f"{size} KiB: {checked.stdout.strip()} {checked.stderr.strip()}")
        finally:
            if is_disk:
                subprocess.run(["umount", place], check=True)
    return {**counts, "faults": faults}


def two(folder: pathlib.Path, count: int, rng: random.Random) -> dict:
    runs, counts, faults = Runs(folder, steps=60), Counter(), []
    for number in range(count):
        out = folder / f"shared{number}"
        first = runs.start(out)
        time.sleep(rng.uniform(0, 2))
        second = runs.start(out)
        ended = [(process.communicate()[1], process.returncode) for process in (first, second)]
        codes = sorted(code for _, code in ended)
        counts[f"exit codes {codes[0]} and {codes[1]}"] += 1
        refused = [said.strip().splitlines()[-1] for said, code in ended if code == 2]
        if codes != [0, 2] or [step for step, _ in prints(out)["losses"]] != list(range(1, 61)):
            faults.append(f"{codes}: {refused}")
    return {**counts, "faults": faults}


CAMPAIGNS = {"kills": (kills, 50), "damage": (damage, 100), "full": (full, 8), "two": (two, 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=CAMPAIGNS)
    parser.add_argument("--count", type=int)
    parser.add_argument("--out", type=pathlib.Path, help="where the result is added, as JSON")
    given = parser.parse_args()
    results = json.loads(given.out.read_text()) if given.out is not None and given.out.exists() else {}
    for name in given.only or CAMPAIGNS:
        campaign, count = CAMPAIGNS[name]
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            result = campaign(pathlib.Path(folder), given.count or count, random.Random(given.seed))
        results[name] = result | {"seed": given.seed, "seconds": round(time.perf_counter() - start)}
        print(f"{name}: {results[name]}", flush=True)
        if given.out is not None:
            given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
