"""The paper's own argument on puppets: what the face mask, the adaptive loss and stage 1 are each worth.

    python benchmarks/puppet_ablations.py --encoders runs/encoders --records runs/records --stage1 runs/stage1 \\
        --out benchmarks/results/puppet_ablations

Every variant trains its own denoiser with the same encoders, records, seed and number of steps (`--steps` of stage 2;
the one without stage 1 also trains for as many steps as stage 1 took), and is read on the same held-out clips and duets
as puppet_quality.py reads. Writes OUT.json: the summaries, and per clip and per mouth of a duet the difference of the
correlation to that of the paper's way, with its standard error. A variant that was trained already in `--work` is not
trained again.
"""

import dataclasses
import json
import time
from pathlib import Path

import jax
import numpy as np
import tyro
from puppet_quality import Args as QualityArgs
from puppet_quality import means, measure, measure_duets, summarise

import mi_jax
from mi_jax.avatar.folders import load_encoders, save_avatar
from mi_jax.train.checkpoints import load_ema
from mi_jax.train.loop import train
from mi_jax.train.objective import load_config

CONFIG = Path(__file__).parent.parent / "configs" / "puppet_stage2.py"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    encoders: Path
    """Model folder of the encoders that made the records."""
    records: tuple[Path, ...]
    stage1: Path
    out: Path
    work: Path = Path("runs/ablations")
    variants: tuple[str, ...] = ("paper", "no_face_mask", "no_adaptive_loss", "no_stage1")
    steps: int = 500
    clips: int = 24
    duets: int = 12
    seconds: float = 2.6
    seed: int = 1000
    """Of the held-out puppets."""


def variants(args: Args) -> dict[str, list[str]]:
    """Overrides of configs/puppet_stage2.py."""
    shared = ["--objective.records", *map(str, args.records), "--sample-every=0"]
    after = [*shared, f"--objective.init-from={args.stage1}", f"--steps={args.steps}"]
    stage1_steps = json.loads((args.stage1 / "config.json").read_text())["steps"]
    return {
        "paper": after,
        "no_face_mask": [*after, "--objective.no-face-masked"],
        "no_adaptive_loss": [*after, "--objective.adaptive-weight=0"],
        "no_stage1": [*shared, f"--steps={args.steps + stage1_steps}", "--objective.init-from=None"],
    }


def run(args: Args, name: str, overrides: list[str]) -> tuple[dict, dict[str, np.ndarray]]:
    """Trains a variant, exports it, and reads it: the summary of puppet_quality.py and the losses at the end; the
    correlation of every mouth."""
    config = load_config(CONFIG, overrides)
    start = time.perf_counter()
    train(config, args.work / name)
    seconds = time.perf_counter() - start
    avatar_config, encoders = load_encoders(args.encoders)
    dit = load_ema(args.work / name, config.objective)
    folder = args.work / f"{name}_model"
    save_avatar(folder, avatar_config, encoders, dit, overwrite=True)
    quality = QualityArgs(
        out=args.out, model=str(folder), clips=args.clips, controls=0, duets=args.duets, seconds=args.seconds,
        seed=args.seed, face_mask=config.objective.face_masked,
    )  # fmt: skip
    avatar = mi_jax.load(str(folder))
    rows, _ = measure(quality, avatar)
    duets, _ = measure_duets(quality, avatar)
    mouths = {
        "correlation": np.array([row["correlation"] for row in rows]),
        "duet_correlation": np.array([row["duet_correlation"] for row in duets]),
    }
    last = (args.work / name / "metrics.csv").read_text().splitlines()
    ends = {k: float(v) for k, v in zip(last[0].split(","), last[-1].split(","))}
    summary = {
        "steps": config.steps,
        "train_seconds": round(seconds),
        "base": ends["base"],
        "face": ends["face"],
    }
    return summary | summarise(rows) | means(duets), mouths


def difference(mouths: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Mean of the paired differences, and its standard error."""
    apart = mouths - reference
    return {"mean": round(float(apart.mean()), 4), "error": round(float(apart.std(ddof=1) / len(apart) ** 0.5), 4)}


def main(args: Args) -> None:
    results = {"args": {k: str(v) for k, v in dataclasses.asdict(args).items()}, "jax": jax.__version__}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    every, paper = variants(args), None
    for name in args.variants:
        results[name], mouths = run(args, name, every[name])
        if name == "paper":
            paper = mouths
        elif paper is not None:
            results[name]["against_paper"] = {
                key: difference(mouths[key], paper[key]) for key in mouths if len(paper[key])
            }
        args.out.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
        print(name, json.dumps(results[name]), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
