"""Quality of a puppet model on held-out clips: faces, voices, languages and sentences that training never saw.

    python benchmarks/puppet_quality.py --clips 100 --out benchmarks/results/puppet_quality

Writes OUT.json (the summary), OUT.csv (a row per clip), OUT_mouth.png (true against generated mouth opening),
OUT_sheet.png (frames) and, if asked, OUT_duets.png. Everything is read from generated pixels by
`mi_jax.puppets.reading`:

- lip sync: Pearson correlation of the mouth opening with the true one (generated; through the VAE alone, the ceiling;
  with another clip's voice, the control), the lag of the best correlation in frames, and how far the mouth opens
  (standard deviation over the true one);
- obedience to each attribute that the prompt directs, also of those told the same, beside what the same reader sees in
  the true clips;
- identity (distance to the portrait outside the mouth) and sharpness, beside the truth's;
- seconds of computation per second of video, after compilation;
- with `--duets N`: two puppets in one picture, each with its own voice: the correlation of each mouth with its own
  true opening, and with the other's.
"""

import csv
import dataclasses
import json
import os
import platform
import time
from pathlib import Path

import jax
import matplotlib
import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

import mi_jax
from mi_jax.data.features import to_pixels, to_signed
from mi_jax.models.tiling import decode_latents, encode_latents
from mi_jax.puppets.clips import Clip, draw
from mi_jax.puppets.groups import Group, draw_duet
from mi_jax.puppets.reading import correlation, identity, mouth_opening, obedience, sharpness, sync_offset

matplotlib.use("agg")
import matplotlib.pyplot as plt

ATTRIBUTES = ("expression", "head_motion", "background_motion")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    out: Path
    model: str = "puppet"
    clips: int = 100
    controls: int = 25
    """Clips that are also made with another clip's voice."""
    duets: int = 0
    """Pictures of two puppets, each with its own voice."""
    seconds: float = 5.16
    split: str = "test"
    """"train" reads clips as training draws them: with `--seed 0 --first N`, clips that it may have seen."""
    first: int = 0
    """Number of the first clip."""
    seed: int = 1000
    """Of the held-out puppets."""
    steps: int | None = None
    guidance_audio: float | None = None
    guidance_text: float | None = None
    face_mask: bool = True
    """Give the true face mask; without it audio may act everywhere."""


def generate(
    avatar: mi_jax.Avatar, args: Args, clip: Clip | Group, audio: list[np.ndarray], masks: list[np.ndarray]
) -> np.ndarray:
    return avatar.animate(
        clip.video[0],
        [mi_jax.Speaker(a, mask=m if args.face_mask else np.ones_like(m)) for a, m in zip(audio, masks)],
        prompt=clip.prompt,
        seed=0,
        steps=args.steps,
        guidance_audio=args.guidance_audio,
        guidance_text=args.guidance_text,
    )


def through_vae(avatar: mi_jax.Avatar, video: np.ndarray) -> np.ndarray:
    vae = avatar.encoders.vae
    return to_pixels(decode_latents(vae, encode_latents(vae, to_signed(video)[None]))[0])


def measure(args: Args, avatar: mi_jax.Avatar) -> tuple[list[dict], list[tuple[Clip, np.ndarray]]]:
    rows, shown = [], []
    take = lambda i: draw(  # noqa: E731
        args.first + i, seed=args.seed, split=args.split, seconds=args.seconds, size=avatar.config.height
    )
    generate(avatar, args, take(0), [take(0).audio], [take(0).mask])  # compiles
    for i in tqdm(range(args.clips), unit="clip"):
        clip = take(i)
        start = time.perf_counter()
        video = generate(avatar, args, clip, [clip.audio], [clip.mask])
        elapsed = time.perf_counter() - start
        through = through_vae(avatar, clip.video)
        true, attributes = clip.mouth[:, 0], clip.attributes
        opening = mouth_opening(video, attributes)
        row = {
            "clip": i,
            "correlation": correlation(opening, true),
            "correlation_vae": correlation(mouth_opening(through, attributes), true),
            "offset": sync_offset(opening, true),
            "opening": float(np.std(opening) / np.std(true)),
            "sharpness": sharpness(video, clip.video),
            "sharpness_vae": sharpness(through, clip.video),
            "identity": identity(video, clip.video[0], attributes),
            "identity_truth": identity(clip.video, clip.video[0], attributes),
            "seconds_per_second": elapsed / (len(video) / 25),
        }
        for name, frames in (("", video), ("_vae", through), ("_truth", clip.video)):
            for attribute, (told, seen) in obedience(frames, attributes).items():
                row[f"{attribute}{name}"] = told == seen
                row[f"{attribute}_told"] = told
        if i < args.controls:
            other = take(i + args.clips)
            row["correlation_control"] = correlation(
                mouth_opening(generate(avatar, args, clip, [other.audio], [clip.mask]), attributes), true
            )
        rows.append(row)
        if i < 16:
            shown.append((clip, video))
    return rows, shown


def measure_duets(args: Args, avatar: mi_jax.Avatar) -> tuple[list[dict], list[tuple[Group, np.ndarray]]]:
    rows, shown = [], []
    for i in tqdm(range(args.duets), unit="duet"):
        duet = draw_duet(i, seed=args.seed, split="test", seconds=args.seconds, size=avatar.config.height)
        video = generate(avatar, args, duet, list(duet.audio), list(duet.mask))
        through = through_vae(avatar, duet.video)
        for k, attributes in enumerate(duet.attributes):
            opening = mouth_opening(video, attributes)
            rows.append(
                {
                    "duet": i,
                    "duet_correlation": correlation(opening, duet.mouth[k, :, 0]),
                    "duet_correlation_vae": correlation(mouth_opening(through, attributes), duet.mouth[k, :, 0]),
                    "duet_correlation_other": correlation(opening, duet.mouth[1 - k, :, 0]),
                    "duet_truth_other": correlation(duet.mouth[k, :, 0], duet.mouth[1 - k, :, 0]),
                }
            )
        shown.append((duet, video))
    return rows, shown[:8]


def summarise(rows: list[dict]) -> dict:
    summary = {"clips": len(rows)} | means(rows)
    summary["correlation"]["share_of_vae"] = round(
        summary["correlation"]["mean"] / summary["correlation_vae"]["mean"], 4
    )
    summary["offset"]["within_1"] = float(np.mean([abs(row["offset"]) <= 1 for row in rows]))
    for attribute in ATTRIBUTES:
        summary[attribute]["of"] = {
            told: round(float(np.mean([row[attribute] for row in rows if row[f"{attribute}_told"] == told])), 4)
            for told in sorted({row[f"{attribute}_told"] for row in rows})
        }
    return summary


def means(rows: list[dict]) -> dict:
    """Mean and median of every column that is no number of a clip."""
    summary = {}
    columns = dict.fromkeys(key for row in rows for key in row)
    for name in [key for key in columns if key not in ("clip", "duet") and not key.endswith("_told")]:
        values = np.array([row[name] for row in rows if name in row], float)
        summary[name] = {"mean": round(values.mean(), 4), "median": round(float(np.median(values)), 4)}
    return summary


def plot_mouths(path: Path, shown: list[tuple[Clip, np.ndarray]]) -> None:
    figure, axes = plt.subplots(4, 2, figsize=(12, 8), sharex=True)
    for axis, (clip, video) in zip(axes.flat, shown):
        opening = mouth_opening(video, clip.attributes)
        seconds = np.arange(len(opening)) / 25
        axis.plot(seconds, 100 * clip.mouth[: len(opening), 0], color="black", label="true")
        axis.plot(seconds, 100 * opening, color="tab:red", label="generated")
        axis.set_title(f"clip {clip.attributes['index']}: r = {correlation(opening, clip.mouth[:, 0]):.2f}", fontsize=9)
        axis.set_ylabel("opening, % of height", fontsize=7)
    axes.flat[0].legend(fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def contact_sheet(path: Path, shown: list[tuple[Clip | Group, np.ndarray]], columns: int = 10) -> None:
    """Per clip two rows: the truth above, generated below; the first column is the portrait."""
    rows = []
    for clip, video in shown:
        at = np.linspace(0, len(video) - 1, columns).astype(int)
        rows += [np.concatenate(list(frames[at]), axis=1) for frames in (clip.video, video)]
    Image.fromarray(np.concatenate(rows, axis=0)).save(path, optimize=True)


def main(args: Args) -> None:
    avatar = mi_jax.load(args.model)
    rows, shown = measure(args, avatar)
    duets, shown_duets = measure_duets(args, avatar)
    summary = (
        summarise(rows)
        | means(duets)
        | {
            "args": {key: str(value) for key, value in dataclasses.asdict(args).items()},
            "date": time.strftime("%Y-%m-%d"),
            "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
            "jax": jax.__version__,
        }
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(summary, indent=2) + "\n")
    fields = list(dict.fromkeys(key for row in rows for key in row))
    with args.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
    plot_mouths(args.out.with_name(args.out.name + "_mouth.png"), shown[:8])
    contact_sheet(args.out.with_name(args.out.name + "_sheet.png"), shown)
    if shown_duets:
        contact_sheet(args.out.with_name(args.out.name + "_duets.png"), shown_duets)
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args))
