"""Feature records for training (paper 4.1.1: VAE, wav2vec2 and portrait features are computed once, in advance)."""

import multiprocessing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mi_jax.data.features import Encoders, clip_record
from mi_jax.data.records import write_records
from mi_jax.errors import InputError
from mi_jax.puppets.clips import Clip, draw
from mi_jax.puppets.groups import Group, draw_duet


def drawn(
    draw: Callable[..., Clip | Group],
    first: int,
    count: int,
    *,
    seed: int,
    split: str,
    seconds: float,
    size: int,
    moving_masks: bool = False,
    workers: int = 1,
) -> Iterator[Clip | Group]:
    """Clips (`draw`) or duets (`draw_duet`) `first` .. `first + count - 1` in order, drawn ahead by other processes."""
    if not count:
        return
    job = partial(draw, seed=seed, split=split, seconds=seconds, size=size, moving_masks=moving_masks)
    # "spawn": a forked child of a process that runs JAX may deadlock.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(job, range(first, first + count), chunksize=4)


def prepare_puppets(
    encoders: Encoders,
    out_dir: str | Path,
    count: int,
    *,
    duets: int = 0,
    first: int = 0,
    seed: int = 0,
    split: str = "train",
    seconds: float = 6.44,
    size: int = 96,
    moving_masks: bool = False,
    workers: int = 1,
) -> None:
    """Writes the records of `count` puppet clips and then of `duets` duets to `out_dir` (see `clip_record`).

    size: of the square clips in pixels, one that the networks take (`AvatarConfig.padded_size`).
    moving_masks: a face mask for each latent frame, in place of one for the whole clip.

    Raises:
      InputError: `out_dir` exists already or cannot be written, the encoders read no voices or no portraits, or the VAE
        takes no clips of this size.
    """
    stride = encoders.vae.config.spatial_stride
    if size % stride:
        raise InputError(f"clips of {size} pixels: the VAE takes multiples of {stride}")
    lacking = {"wav2vec2": encoders.wav2vec2, "vision tower": encoders.mllm.vision}
    for name, module in lacking.items():
        if module is None:
            raise InputError(f"these encoders have no {name}, which the records of talking portraits need")
    options = {"seed": seed, "split": split, "seconds": seconds, "size": size, "moving_masks": moving_masks}

    def records() -> Iterator[dict[str, np.ndarray]]:
        with tqdm(total=count + duets, unit="clip", desc="preparing") as bar:
            for clip in drawn(draw, first, count, workers=workers, **options):
                yield clip_record(encoders, clip.video, clip.audio[None], clip.prompt, clip.mask[None])
                bar.update()
            for duet in drawn(draw_duet, first, duets, workers=workers, **options):
                yield clip_record(encoders, duet.video, duet.audio, duet.prompt, duet.mask)
                bar.update()

    write_records(out_dir, records(), meta={"puppets": {"first": first, "count": count, "duets": duets, **options}})
