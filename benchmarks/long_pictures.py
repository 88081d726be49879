"""A minute of one held-out puppet, and half a minute of two and of three, to be looked at.

    python benchmarks/long_pictures.py --out out/long

For `one`, `two` and `three`: OUT_one.mp4; OUT_one.png, frames around the middle of everything that two windows share
(the truth above, generated below; the middle column is the seam); OUT_one_mouths.png, how far each mouth is open, true
and generated, seams marked. The numbers of seams and lips are printed.
"""

import dataclasses
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro
from long_seams import Variant, opening, seams
from PIL import Image

import mi_jax
from mi_jax.puppets.clips import draw
from mi_jax.puppets.groups import draw_duet, draw_trio
from mi_jax.puppets.reading import correlation

AROUND = (-6, -4, -2, -1, 0, 1, 2, 4, 6)
"""Frames from a seam."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    out: Path
    model: str = "puppet"
    window: int = 33
    overlap: int = 8
    order: str = "wavefront"
    clip: int = 0
    group: int = 0
    seed: int = 1000
    """Of the held-out puppets."""


def sheet(path: Path, true: np.ndarray, made: np.ndarray, borders: list[int]) -> None:
    rows = [np.concatenate([video[border + k] for k in AROUND], axis=1) for border in borders for video in (true, made)]
    half = (len(borders) + 1) // 2 * 2
    columns = [np.concatenate(part) for part in (rows[:half], rows[half:]) if part]
    height = max(len(column) for column in columns)
    columns = [np.pad(x, ((0, height - len(x)), (0, 6), (0, 0)), constant_values=255) for x in columns]
    Image.fromarray(np.concatenate(columns, axis=1)).save(path, optimize=True)


def plot(path: Path, true: np.ndarray, said: np.ndarray, borders: list[int]) -> None:
    """Openings [puppets frames], half a minute to a row."""
    parts = range(0, true.shape[1] - 25, 750)
    figure, axes = plt.subplots(len(parts) * len(true), 1, figsize=(14, 2.1 * len(parts) * len(true)), squeeze=False)
    for row, (k, first) in enumerate((k, first) for k in range(len(true)) for first in parts):
        axis, part = axes[row, 0], slice(first, first + 750)
        seconds = np.arange(true.shape[1])[part] / 25
        for border in borders:
            if part.start <= border < part.stop:
                axis.axvline(border / 25, color="tab:blue", linewidth=0.8, alpha=0.6)
        axis.plot(seconds, 100 * true[k, part], color="black", linewidth=0.9, label="true")
        axis.plot(seconds, 100 * said[k, part], color="tab:red", linewidth=0.9, label="generated")
        axis.set_xlim(seconds[0], seconds[0] + 30)
        if not part.start:
            who = f"puppet {k + 1}: " if len(true) > 1 else ""
            axis.set_title(f"{who}r = {correlation(said[k], true[k]):.2f}", fontsize=9)
        axis.set_ylabel("opening, %", fontsize=8)
    axes[0, 0].legend(fontsize=8, loc="upper right")
    axes[-1, 0].set_xlabel("seconds; blue: the middle of what two windows share")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(args: Args) -> None:
    avatar = mi_jax.load(args.model, devices=1)
    variant = Variant("", avatar, args.window, args.overlap, args.order, 0, 0.0)
    one = draw(args.clip, seed=args.seed, split="test", seconds=60, size=96)
    two, three = (make(args.group, seed=args.seed, split="test", seconds=30) for make in (draw_duet, draw_trio))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name, clip in (("one", one), ("two", two), ("three", three)):
        single = clip.audio.ndim == 1
        voices, masks = ([clip.audio], [clip.mask]) if single else (list(clip.audio), list(clip.mask))
        attributes = [clip.attributes] if single else clip.attributes
        true = clip.mouth[None, :, 0] if single else clip.mouth[:, :, 0]
        speakers = [mi_jax.Speaker(voice, mask=mask) for voice, mask in zip(voices, masks, strict=True)]
        video = avatar.animate(
            clip.video[0], speakers, clip.prompt, window=args.window, overlap=args.overlap, order=args.order
        )
        beside = lambda end, name=name: args.out.with_name(f"{args.out.name}_{name}{end}")  # noqa: E731
        mi_jax.save_video(beside(".mp4"), video, sum(voices))
        count = min(len(video), len(clip.video))
        video, borders = video[:count], variant.borders(count)
        borders = [border for border in borders if border + AROUND[-1] < count]
        said = np.stack([opening(video, one) for one in attributes])
        sheet(beside(".png"), clip.video, video, borders)
        plot(beside("_mouths.png"), true[:, :count], said, borders)
        lips = [round(correlation(a, b), 3) for a, b in zip(said, true[:, :count], strict=True)]
        print(f"{name}: {count} frames, {len(borders)} seams, mean and worst {seams(video, borders)}, lips {lips}")


if __name__ == "__main__":
    main(tyro.cli(Args))
