"""Feature records for training (paper 4.1.1: VAE, wav2vec2 and portrait features are computed once, in advance)."""

import multiprocessing
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mi_jax.data.features import Encoders, clip_record
from mi_jax.data.puppets import Clip, draw
from mi_jax.data.records import write_records


def drawn_clips(
    first: int, count: int, *, seed: int, split: str, seconds: float, size: int, workers: int = 1
) -> Iterator[Clip]:
    """Puppet clips `first` .. `first + count - 1` in order, drawn ahead by other processes."""
    job = partial(draw, seed=seed, split=split, seconds=seconds, size=size)
    # "spawn": a forked child of a process that runs JAX may deadlock.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(job, range(first, first + count), chunksize=4)


def prepare_puppets(
    encoders: Encoders,
    out_dir: str | Path,
    count: int,
    *,
    first: int = 0,
    seed: int = 0,
    split: str = "train",
    seconds: float = 5.16,
    size: int = 96,
    workers: int = 1,
) -> None:
    """Writes the records of `count` puppet clips to `out_dir` (see `clip_record`).

    Raises:
      InputError: `out_dir` exists already or cannot be written.
    """
    clips = drawn_clips(first, count, seed=seed, split=split, seconds=seconds, size=size, workers=workers)

    def records() -> Iterator[dict[str, np.ndarray]]:
        for clip in tqdm(clips, total=count, unit="clip", desc="preparing"):
            yield clip_record(encoders, clip.video, clip.audio, clip.prompt, clip.mask)

    meta = {"puppets": {"first": first, "seed": seed, "split": split, "seconds": seconds, "size": size}}
    write_records(out_dir, records(), meta=meta)
