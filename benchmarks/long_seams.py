"""Seams and drift of long videos, on held-out puppets that talk for minutes.

    python benchmarks/long_seams.py --seconds 600 --clips 1 --out benchmarks/results/long_seams \
        --variants "paper=puppet,33,8,wavefront" "causal=puppet,33,8,causal" "apart=puppet,33,0,independent"

A variant is NAME=MODEL,WINDOW,OVERLAP,ORDER[,STEPS,GUIDANCE_AUDIO[,LATER]]. Beside the sampler's own orders there are
`independent` (windows that share nothing, each from noise of its own) and `shifted` (the windows lie elsewhere at every
noise level). LATER says what windows but the first are told of the portrait: `identity` (who it is, not that it comes
now: the sampler's way), `start` (the video begins here) or `nothing` (no portrait beside the latents). Writes OUT.json
and OUT.csv (a row per clip, variant and minute). Read from generated pixels:

- seam: how much frames change where windows meet (in the four frames around the middle of what they share; where they
  share nothing, at the border), over the median change of all frames; the mean of all borders;
- worst: the same of the border at which most changes;
- lips: correlation of the mouth's opening with the true one; by minute, and by place inside a window (fifths);
- identity (distance to the portrait outside the mouth), sharpness relative to the truth's, and colour (distance of the
  mean colour to the portrait's, of 255), by minute;
- later: sharpness of all windows but the first, over that of the first.
"""

import csv
import dataclasses
import itertools
import json
import os
import platform
import time
from pathlib import Path

import jax
import numpy as np
import tyro
from tqdm import tqdm

import mi_jax
from mi_jax.puppets.clips import draw
from mi_jax.puppets.reading import correlation, identity, mouth_opening, sharpness
from mi_jax.sample.avatar import guidance_weights, guided_velocity
from mi_jax.sample.inputs import num_frames
from mi_jax.sample.noise import FrameNoise
from mi_jax.sample.windows import blend_weights

MINUTE = 60 * 25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    out: Path
    variants: tuple[str, ...]
    seconds: float = 600.0
    clips: int = 1
    first: int = 0
    seed: int = 1000
    """Of the held-out puppets."""


@dataclasses.dataclass(frozen=True)
class Variant:
    name: str
    avatar: mi_jax.Avatar
    window: int
    overlap: int
    order: str
    steps: int
    guidance: float
    later: str = "identity"

    @property
    def step(self) -> int:
        return self.window - self.overlap

    def make(self, clip) -> np.ndarray:
        latent_frames = (len(clip.video) - 1) // 4 + 1
        told = self.avatar.listening(clip.video[0], [clip.mask], [clip.audio], clip.prompt, latent_frames)
        told = Told(told, self.later)
        call = {"steps": self.steps, "window": self.window, "weights": {"audio": self.guidance, "text": 0.0}}
        if self.order == "shifted":
            return self.avatar.decode(self.shifted(told, latent_frames))
        if self.order != "independent":
            latents = self.avatar.denoise(told, seed=0, overlap=self.overlap, order=self.order, **call)
            return self.avatar.decode(latents)
        parts = []
        for number, start in enumerate(range(0, latent_frames, self.window)):
            one = Apart(told, start, self.window)
            parts.append(self.avatar.denoise(one, seed=number, overlap=3, **call))
        return self.avatar.decode(np.concatenate(parts)[:latent_frames])

    def shifted(self, told: "Told", frames: int) -> np.ndarray:
        """Level by level as the paper has it, from windows that lie elsewhere at each."""
        config = self.avatar.config
        weights = guidance_weights(config.dit, {"audio": self.guidance})
        velocity = jax.jit(jax.tree_util.Partial(guided_velocity, self.avatar.dit, weights))
        height, width = (side // config.vae.spatial_stride for side in config.padded_size)
        shape = (1, height, width, config.vae.latent_channels)
        x = np.array(FrameNoise(jax.random.key(0), shape).window(0, frames))
        sigmas = np.asarray(config.sigmas(self.steps))
        for level, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
            starts = np.array(shifted_starts(frames, self.window, self.step, level * self.step // self.steps))
            blend, total = blend_weights(starts, self.window, frames), np.zeros_like(x)
            for start, weight in zip(starts, blend, strict=True):
                part = slice(start, start + self.window)
                u = velocity(x[:, part], np.full(1, sigma), told.window(int(start), self.window))
                total[:, part] += weight[:, None, None, None] * np.asarray(u)
            x += (following - sigma) * total
        return x[0]

    def borders(self, frames: int) -> list[int]:
        """The frame in the middle of what two windows share."""
        middles = (self.step * k + self.overlap / 2 for k in range(1, frames))
        return [at for middle in middles if (at := round(4 * middle) - 2) + 2 < frames - 1]


def shifted_starts(frames: int, window: int, step: int, by: int) -> list[int]:
    """Of windows that cover a video of `frames` and lie `by` later than usual, but for the first and the last."""
    last = frames - window
    return sorted({0, *range(by, last, step), last})


@dataclasses.dataclass(frozen=True)
class Told:
    """What later windows are told of the portrait, changed."""

    told: object
    later: str

    @property
    def fixed(self):
        return self.told.fixed

    def known(self, frames=None):
        return self.told.known(frames)

    def window(self, start, length):
        one = self.told.window(start, length)
        if start == 0 or self.later == "identity":
            return one
        if self.later == "start":
            return dataclasses.replace(one, is_start=np.ones_like(one.is_start))
        return dataclasses.replace(one, portrait=np.zeros_like(one.portrait))


@dataclasses.dataclass(frozen=True)
class Apart:
    """One window of a video as a video of its own."""

    told: object
    start: int
    length: int

    @property
    def fixed(self):
        return self.told.fixed

    def known(self, frames=None):
        return self.length, True

    def window(self, start, length):
        return self.told.window(self.start + start, length)


def open_variants(texts: tuple[str, ...]) -> list[Variant]:
    variants, loaded = [], {}
    for text in texts:
        name, _, rest = text.partition("=")
        model, window, overlap, order, *more = rest.split(",")
        avatar = loaded.setdefault(model, mi_jax.load(model, devices=1) if model not in loaded else None)
        steps, guidance, *later = more or (avatar.config.steps, avatar.config.guidance_audio)
        variants.append(Variant(name, avatar, int(window), int(overlap), order, int(steps), float(guidance), *later))
    return variants


def opening(video: np.ndarray, attributes: dict) -> np.ndarray:
    """By minutes: the mouth is looked for over time, in memory of the square of it."""
    return np.concatenate([mouth_opening(video[i : i + MINUTE], attributes) for i in range(0, len(video), MINUTE)])


def seams(video: np.ndarray, borders: list[int]) -> tuple[float, float]:
    """(mean, worst) over borders of the change around them, over the median change."""
    frames = np.arange(len(video) - 1)
    change = np.array([np.abs(video[i + 1].astype(np.float32) - video[i]).mean() for i in frames])
    at = [change[max(0, border - 2) : border + 2].mean() for border in borders]
    usual = max(float(np.median(change)), 1e-6)
    return float(np.mean(at) / usual), float(np.max(at) / usual)


def read(variant: Variant, clip, video: np.ndarray, true: np.ndarray) -> tuple[dict, list[dict]]:
    attributes = clip.attributes
    said, borders = opening(video, attributes), variant.borders(len(video))
    mean, worst = seams(video, borders)
    place = (np.arange(len(video)) // 4 % variant.step) * 5 // variant.step
    window = 4 * variant.step
    whole = {
        "seam": mean,
        "worst": worst,
        "lips": correlation(said, true),
        "lips_by_place": [round(correlation(said[place == i], true[place == i]), 4) for i in range(5)],
        "later": sharpness(video[window:], clip.video[window:]) / sharpness(video[:window], clip.video[:window]),
    }
    minutes = []
    for number, start in enumerate(range(0, len(video) - MINUTE // 2, MINUTE)):
        part = slice(start, start + MINUTE)
        minutes.append(
            {
                "minute": number + 1,
                "lips": correlation(said[part], true[part]),
                "identity": identity(video[part], clip.video[0], attributes),
                "sharpness": sharpness(video[part], clip.video[part]),
                "colour": float(np.abs(video[part].mean((0, 1, 2)) - clip.video[0].mean((0, 1))).mean()),
            }
        )
    return whole, minutes


def main(args: Args) -> None:
    variants = open_variants(args.variants)
    rows, wholes = [], {variant.name: [] for variant in variants} | {"truth": []}
    for i in tqdm(range(args.first, args.first + args.clips), unit="clip"):
        clip = draw(i, seed=args.seed, split="test", seconds=args.seconds, size=96)
        true = clip.mouth[:, 0]
        for variant in variants:
            start = time.perf_counter()
            video = variant.make(clip)
            whole, minutes = read(variant, clip, video, true)
            wholes[variant.name].append(whole | {"work_s": time.perf_counter() - start})
            rows += [{"variant": variant.name, "clip": i} | minute for minute in minutes]
        mean, worst = seams(clip.video, variants[0].borders(len(clip.video)))
        wholes["truth"].append({"seam": mean, "worst": worst})
    summary = {}
    for name, found in wholes.items():
        summary[name] = {key: np.round(np.mean([x[key] for x in found], axis=0), 4).tolist() for key in found[0]}
        own = [row for row in rows if row["variant"] == name]
        for key in ("lips", "identity", "sharpness", "colour") if own else ():
            last = max(row["minute"] for row in own)
            ends = [np.mean([row[key] for row in own if row["minute"] == minute]) for minute in (1, last)]
            summary[name][f"{key}_first_last"] = np.round(ends, 4).tolist()
    report = {
        "variants": summary,
        "args": {key: str(value) for key, value in dataclasses.asdict(args).items()},
        "frames": num_frames(args.seconds),
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    with args.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for name, numbers in summary.items():
        print(name, numbers)


if __name__ == "__main__":
    main(tyro.cli(Args))
