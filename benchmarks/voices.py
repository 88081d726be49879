"""Several voices in one picture: whose mouth follows whose voice, and whether those who are silent keep theirs shut.

    python benchmarks/voices.py --model puppet --groups 16 --out benchmarks/results/voices

Two and three held-out puppets (`mi_jax.puppets.groups`; what ships was trained on pairs, never on three), who take
turns or talk at the same time. Writes OUT.json, OUT.csv (a row per puppet) and OUT.png (frames: the truth above,
generated below). Read from generated pixels, and beside it from the truth that went through the VAE:

- own: correlation of a mouth's opening with that of its own voice's truth; of those who talk for a second at least;
- other: with what the others say, where one talks alone at a time; truth_other is the same of the true mouth;
- silent: spread of the opening over time in frames without a sound of its own for 0.3 s around, over the VAE's;
- bystander: the same of a video in which the first voice alone is given, for all others.
"""

import csv
import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import tyro
from PIL import Image
from puppet_quality import through_vae
from tqdm import tqdm

import mi_jax
from mi_jax.puppets.groups import Group, draw_duet, draw_trio
from mi_jax.puppets.reading import correlation, mouth_opening


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    out: Path
    model: str = "puppet"
    groups: int = 16
    """Of two, and as many of three."""
    seconds: float = 5.16
    size: int = 96
    """Pixels; the shipped puppets were trained at 96."""
    seed: int = 1000
    """Of the held-out puppets."""
    steps: int | None = None
    shown: int = 3


def heard(group: Group, margin: int = 0) -> np.ndarray:
    """[n f]: whether a puppet's own voice sounds in a frame, or up to `margin` frames from it."""
    frames = len(group.video)
    loud = np.abs(group.audio.reshape(len(group.audio), frames, -1)).max(-1) > 0.02
    return np.stack([np.convolve(row, np.ones(2 * margin + 1), "same") > 0 for row in loud])


def others(mouths: np.ndarray, k: int) -> np.ndarray:
    return np.delete(mouths, k, axis=0).max(0)


def read(group: Group, kind: str, number: int, videos: dict[str, np.ndarray]) -> list[dict]:
    """A row of each puppet. videos: generated, through (the VAE), alone (the first voice only)."""
    speaks, near = heard(group).sum(1), heard(group, margin=8)
    turns = (heard(group).sum(0) > 1).mean() < 0.08
    rows, true = [], group.mouth[:, :, 0]
    for k, attributes in enumerate(group.attributes):
        opening = {name: mouth_opening(video, attributes) for name, video in videos.items()}
        row = {"kind": kind, "group": number, "puppet": k, "seconds_of_speech": round(speaks[k] / 25, 2)}
        if speaks[k] >= 25:
            row |= {
                "own": correlation(opening["generated"], true[k]),
                "own_vae": correlation(opening["through"], true[k]),
            }
        if turns:
            row |= {
                "other": correlation(opening["generated"], others(true, k)),
                "truth_other": correlation(true[k], others(true, k)),
            }
        quiet = ~near[k]
        if quiet.sum() >= 25:
            row |= {"silent": opening["generated"][quiet].std(), "silent_vae": opening["through"][quiet].std()}
        if k:
            row |= {"bystander": opening["alone"].std()}
            if quiet.sum() >= 25:
                row |= {"bystander_vae": opening["through"][quiet].std()}
        rows.append(row)
    return rows


def measure(args: Args, avatar: mi_jax.Avatar, kind: str, draw: Callable) -> tuple[list[dict], list[np.ndarray]]:
    rows, shown = [], []
    for i in tqdm(range(args.groups), desc=kind):
        group = draw(i, seed=args.seed, split="test", seconds=args.seconds, size=args.size)

        def make(voices: int, group=group) -> np.ndarray:
            speakers = [
                mi_jax.Speaker(audio if k < voices else np.zeros_like(audio), mask=mask)
                for k, (audio, mask) in enumerate(zip(group.audio, group.mask, strict=True))
            ]
            size = {"height": args.size, "width": args.size}
            return avatar.animate(group.video[0], speakers, group.prompt, seed=0, steps=args.steps, **size)

        through = through_vae(avatar, group.video)
        videos = {"generated": make(len(group.audio)), "alone": make(1), "through": through}
        rows += read(group, kind, i, videos)
        if i < args.shown:
            at = np.linspace(0, len(through) - 1, 8).astype(int)
            shown += [np.concatenate(list(video[at]), axis=1) for video in (group.video, videos["generated"])]
    return rows, shown


def summarise(rows: list[dict]) -> dict:
    """Means and their standard errors; motion in silence as a ratio of means."""
    summary = {"puppets": len(rows)}
    for name in ("own", "own_vae", "other", "truth_other"):
        values = np.array([row[name] for row in rows if name in row])
        error = values.std() / max(1, len(values)) ** 0.5
        summary[name] = {"mean": round(float(values.mean()), 4), "error": round(float(error), 4), "of": len(values)}
    for name in ("silent", "bystander"):
        both = np.array([(row[name], row[f"{name}_vae"]) for row in rows if name in row and f"{name}_vae" in row])
        summary[f"{name}_over_vae"] = {"ratio": round(float(both[:, 0].mean() / both[:, 1].mean()), 4), "of": len(both)}
        summary[f"{name}_opening"] = [round(float(x), 5) for x in both.mean(0)]
    return summary


def main(args: Args) -> None:
    avatar, rows, shown = mi_jax.load(args.model, devices=1), [], []
    for kind, draw in (("two", draw_duet), ("three", draw_trio)):
        more, frames = measure(args, avatar, kind, draw)
        rows, shown = rows + more, shown + frames
    report = {kind: summarise([row for row in rows if row["kind"] == kind]) for kind in ("two", "three")} | {
        "args": {key: str(value) for key, value in dataclasses.asdict(args).items()},
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    with args.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    Image.fromarray(np.concatenate(shown, axis=0)).save(args.out.with_suffix(".png"), optimize=True)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args))
