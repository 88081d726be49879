"""`mi-jax prepare`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from mi_jax.bounds import ClipSeconds, Count, Seed, Within, Workers
from mi_jax.commands.puppets import drawing
from mi_jax.errors import InputError
from mi_jax.interrupts import work_begins


def prepare(
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    puppets: Annotated[int, Within(1, 10**9), tyro.conf.arg(metavar="COUNT")],
    duets: Count = 0,
    model: Annotated[str, tyro.conf.arg(metavar="puppet|DIR")] = "puppet",
    first: Count = 0,
    seed: Seed = 0,
    split: Literal["train", "test"] = "train",
    seconds: ClipSeconds = 6.44,
    moving_masks: bool = False,
    workers: Workers = 0,
) -> None:
    """Computes the features of clips once, as records to train on.

    The clips are as high as the model's videos, padded to what its networks take (540 pixels: 544), and square.

    Args:
      out: the folder to write; it must not exist yet.
      puppets: how many puppet clips to draw.
      duets: how many clips of two puppets to add, each with its own voice.
      model: whose encoders: a shipped model or a model folder (a denoiser is not needed).
      first: number of the first clip, and of the first duet.
      seed: of the puppets.
      split: faces, voices and sentences to train on, or those held out.
      seconds: length of each clip; longer than the longest window of the training that it is for, so that windows of
        that length also start later (41 latent frames, for one of 33).
      moving_masks: a face mask for each latent frame, which follows the face; without, one for the whole clip.
      workers: processes that draw ahead; 0 takes one per core.
    """
    import os

    from mi_jax.avatar.folders import avatar_config, load_encoders
    from mi_jax.puppets.clips import check_clip
    from mi_jax.puppets.prepare import prepare_puppets

    check_clip(seconds, avatar_config(model).padded_size[0])
    config, encoders = load_encoders(model)
    if encoders.wav2vec2 is None or encoders.mllm.vision is None:
        raise InputError(f"{model}: records need a model that hears voices and sees portraits")
    work_begins()
    with drawing():
        prepare_puppets(
            encoders,
            out,
            puppets,
            duets=duets,
            first=first,
            seed=seed,
            split=split,
            seconds=seconds,
            size=config.padded_size[0],  # of 540 pixels the networks see 544, here as in `animate`
            moving_masks=moving_masks,
            workers=workers or os.cpu_count() or 1,
        )
