"""Curves of trainings: a panel for each column of metrics.csv, the runs that follow each other on one axis of steps.

    python benchmarks/training_curves.py docs/images/training_curves.png \\
        --panel psnr runs/vae_first runs/vae --panel base runs/stage1 runs/stage2

Each dot is a value as logged (the mean since the one before), each line their mean over the last twentieth of the run.
Every second run is shaded. Runs of a panel may differ in what their loss weighs and at which noise levels, so only what
lies within a run can be compared.
"""

import csv
import dataclasses
from pathlib import Path

import matplotlib
import numpy as np
import tyro

matplotlib.use("agg")
import matplotlib.pyplot as plt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    out: tyro.conf.Positional[Path]
    panel: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]
    """A column, and the runs it is taken from."""


def read(run: Path, column: str) -> np.ndarray:
    """Steps and values [2 n]."""
    with (run / "metrics.csv").open() as file:
        rows = [(float(row["step"]), float(row[column])) for row in csv.DictReader(file) if row[column]]
    return np.array(rows).T


def draw(axis: plt.Axes, column: str, runs: list[Path]) -> None:
    start = 0.0
    for number, run in enumerate(runs):
        steps, values = read(run, column)
        axis.plot(start + steps, values, ".", markersize=1.5, color="tab:blue", alpha=0.3)
        width = max(1, len(values) // 20)
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axis.plot(start + steps[width - 1 :], smooth, color="tab:blue")
        if number % 2:
            axis.axvspan(start, start + steps[-1], color="black", alpha=0.06, linewidth=0)
        at = (start + steps[-1] / 2, 1.02)
        axis.annotate(run.name, at, xycoords=("data", "axes fraction"), fontsize=7, ha="center")
        start += steps[-1]
    axis.set_xlim(0, start)
    axis.set_ylabel(column)
    axis.set_xlabel("steps")


def main(args: Args) -> None:
    rows = -(-len(args.panel) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(13, 2.9 * rows), squeeze=False)
    for axis, (column, *runs) in zip(axes.flat, args.panel):
        draw(axis, column, [Path(run) for run in runs])
    for axis in axes.flat[len(args.panel) :]:
        axis.remove()
    figure.tight_layout()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=100)


if __name__ == "__main__":
    main(tyro.cli(Args))
