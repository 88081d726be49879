"""Teachers and their few-step students on held-out puppets, on the same clips and from the same noise.

    python benchmarks/distillation.py --clips 100 --out benchmarks/results/distillation \
        --variants "teacher 25=puppet-teacher,,25,1" "teacher 4=puppet-teacher,,4,0" "DMD2=puppet,,4,0"

A variant is NAME=MODEL,LORA,STEPS,GUIDANCE_AUDIO; LORA may be empty. `--run RUN` adds every checkpoint that a
distillation keeps, each sampled as its student is, and says which one to take by lips and motion (`chosen`). Writes
OUT.json, OUT.csv (a row per clip and variant) and OUT.png (frames: the truth, then each variant). Read from generated
pixels (`mi_jax.puppets.reading`):

- correlation, offset: of the mouth's opening with the true one, and the lag in frames of the best correlation;
- identity (distance to the portrait outside the mouth) and sharpness, relative to the truth's;
- motion: how much pixels vary over time, relative to the truth's;
- obedience to expression, head and background motion that the prompt directs;
- frechet: distance of Gaussians fitted to latent frames of all clips, generated and true (pooled to 3x3 places);
- diversity: how far videos of other seeds are apart, in latents (the first clips alone);
- evaluations of the denoiser for a window, and seconds of denoising per second of video after compilation.
"""

import csv
import dataclasses
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

import mi_jax
from mi_jax.data.features import to_signed
from mi_jax.models.tiling import encode_latents
from mi_jax.puppets.clips import draw
from mi_jax.puppets.reading import correlation, identity, mouth_opening, obedience, sharpness, sync_offset
from mi_jax.train.export import averaged_checkpoint, sampled_in
from mi_jax.weights.factors import factors_of, save_factors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    out: Path
    variants: tuple[str, ...]
    run: Path | None = None
    """Of `mi-jax train`: a student of factors."""
    base: str = "puppet-teacher"
    """The model that the factors of `run` change."""
    clips: int = 100
    seconds: float = 2.6
    seed: int = 1000
    """Of the held-out puppets."""
    first: int = 0
    diversity_clips: int = 8
    """Clips that are made from three seeds."""
    shown: int = 6


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str
    avatar: mi_jax.Avatar
    steps: int
    guidance: float

    def denoise(self, conditions: mi_jax.Conditions, seed: int = 0) -> np.ndarray:
        """Latents [t h w c] under the conditions of `told`, which are the same for all variants: factors adapt none of
        what makes them."""
        return self.avatar.denoise(
            conditions, seed=seed, steps=self.steps, window=33, overlap=8, weights={"audio": self.guidance, "text": 0.0}
        )

    def seconds(self, conditions: mi_jax.Conditions) -> float:
        """Of denoising alone, the least of three runs after compilation."""
        self.denoise(conditions)
        runs = []
        for _ in range(3):
            start = time.perf_counter()
            self.denoise(conditions)
            runs.append(time.perf_counter() - start)
        return min(runs)


def open_variants(texts: tuple[str, ...]) -> list[Variant]:
    variants, loaded = [], {}
    for text in texts:
        name, _, rest = text.partition("=")
        model, lora, steps, guidance = rest.split(",")
        if (model, lora) not in loaded:
            loaded[model, lora] = mi_jax.load(model, lora=[lora] if lora else [])
        variants.append(Variant(name, loaded[model, lora], int(steps), float(guidance)))
    return variants


def checkpoints_of(run: Path, base: str, folder: Path) -> list[str]:
    """A variant of each checkpoint that a run keeps; the factors are written to `folder`."""
    sampled, texts = sampled_in(run), []
    for step in sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()):
        file = folder / f"{step}.safetensors"
        save_factors(file, factors_of(averaged_checkpoint(run, step=step)))
        texts.append(f"step {step}={base},{file},{sampled['steps']},0")
    return texts


def chosen(summary: dict[str, dict], reference: str, names: list[str]) -> str | None:
    """Of these variants the one whose lips are best among those that move 0.9 to 1.1 times as much as the reference;
    None where none does. Losses do not tell students apart."""
    least, most = (share * summary[reference]["motion"]["mean"] for share in (0.9, 1.1))
    moving = [name for name in names if least <= summary[name]["motion"]["mean"] <= most]
    return max(moving, key=lambda name: summary[name]["correlation"]["mean"], default=None)


def told(avatar: mi_jax.Avatar, clip) -> mi_jax.Conditions:
    return avatar.conditions(clip.video[0], [clip.mask], [clip.audio], clip.prompt, (len(clip.video) - 1) // 4 + 1)


def motion(video: np.ndarray) -> float:
    """Mean over pixels of the standard deviation over time."""
    return float(np.std(video.astype(np.float32), axis=0).mean())


def pooled(latents: np.ndarray) -> np.ndarray:
    """Latent frames [t h w c] at 3x3 places, [t 3 3 c]."""
    t, h, w, c = latents.shape
    return latents[:, : h // 3 * 3, : w // 3 * 3].reshape(t, 3, h // 3, 3, w // 3, c).mean((2, 4))


def frechet(ours: np.ndarray, truth: np.ndarray) -> float:
    """Squared distance of two Gaussians fitted to samples [n d]: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))."""
    (m1, c1), (m2, c2) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (ours, truth))
    values = np.linalg.eigvals(c1 @ c2)
    root = np.sqrt(np.maximum(values.real, 0)).sum()
    return float(np.square(m1 - m2).sum() + np.trace(c1) + np.trace(c2) - 2 * root)


def measure(args: Args, variants: list[Variant]) -> tuple[list[dict], dict, list[np.ndarray]]:
    first, rows, shown = variants[0].avatar, [], []
    take = lambda i: draw(args.first + i, seed=args.seed, split="test", seconds=args.seconds, size=96)  # noqa: E731
    frames, apart = {variant.name: [] for variant in variants}, {variant.name: [] for variant in variants}
    truth = []
    for i in tqdm(range(args.clips), unit="clip"):
        clip = take(i)
        attributes, true, conditions = clip.attributes, clip.mouth[:, 0], told(first, clip)
        truth.append(pooled(np.asarray(encode_latents(first.encoders.vae, to_signed(clip.video)[None])[0])))
        columns = [clip.video]
        for variant in variants:
            latents = variant.denoise(conditions)
            video = first.decode(latents)
            opening = mouth_opening(video, attributes)
            row = {
                "variant": variant.name,
                "clip": args.first + i,
                "correlation": correlation(opening, true),
                "offset": abs(sync_offset(opening, true)),
                "identity": identity(video, clip.video[0], attributes),
                "sharpness": sharpness(video, clip.video),
                "motion": motion(video) / motion(clip.video),
            }
            row |= {name: float(wanted == seen) for name, (wanted, seen) in obedience(video, attributes).items()}
            rows.append(row)
            frames[variant.name].append(pooled(latents))
            columns.append(video)
            if i < args.diversity_clips:
                seeds = [pooled(variant.denoise(conditions, seed)) for seed in (1, 2)] + frames[variant.name][-1:]
                pairs = [np.sqrt(np.square(a - b).mean()) for k, a in enumerate(seeds) for b in seeds[:k]]
                apart[variant.name].append(float(np.mean(pairs)))
        if i < args.shown:
            at = np.linspace(0, len(clip.video) - 1, 8).astype(int)
            shown += [np.concatenate(list(video[at]), axis=1) for video in columns]
    conditions = told(first, take(0))
    flat = {name: np.concatenate(parts).reshape(sum(map(len, parts)), -1) for name, parts in frames.items()}
    true = np.concatenate(truth).reshape(sum(map(len, truth)), -1)
    summary = {}
    for variant in variants:
        own = [row for row in rows if row["variant"] == variant.name]
        numbers = {name: [row[name] for row in own] for name in own[0] if name not in ("variant", "clip")}
        summary[variant.name] = {
            name: {"mean": round(float(np.mean(x)), 4), "error": round(float(np.std(x) / np.sqrt(len(x))), 4)}
            for name, x in numbers.items()
        }
        branches = 1 if variant.guidance == 0 else 2
        seconds = variant.seconds(conditions)
        summary[variant.name] |= {
            "frechet": round(frechet(flat[variant.name], true), 4),
            "diversity": round(float(np.mean(apart[variant.name])), 4) if apart[variant.name] else None,
            "evaluations": variant.steps * branches,
            "seconds_per_second": round(seconds / args.seconds, 4),
        }
    return rows, summary, shown


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        kept = [] if args.run is None else checkpoints_of(args.run, args.base, Path(folder))
        variants = open_variants((*args.variants, *kept))
    rows, summary, shown = measure(args, variants)
    report = {
        "variants": summary,
        "args": {key: str(value) for key, value in dataclasses.asdict(args).items()},
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
        "jax": jax.__version__,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    with args.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    Image.fromarray(np.concatenate(shown, axis=0)).save(args.out.with_suffix(".png"), optimize=True)
    for name, numbers in summary.items():
        print(name, {key: value["mean"] if isinstance(value, dict) else value for key, value in numbers.items()})
    if kept:
        names = [text.partition("=")[0] for text in kept]
        print(f"to take of {args.run}: {chosen(summary, variants[0].name, names) or 'none moves as the first variant'}")


if __name__ == "__main__":
    main(tyro.cli(Args))
