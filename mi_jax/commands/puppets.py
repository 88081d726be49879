"""`mi-jax puppets`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mi_jax.bounds import ClipSeconds, PuppetSize, Seed, Within
from mi_jax.errors import InputError
from mi_jax.interrupts import work_begins


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Says what to install where the puppets' libraries are missing."""
    try:
        yield
    except ModuleNotFoundError as missing:
        raise InputError(f"puppets need {missing.name}: pip install 'mi-jax[puppets]'") from missing


def puppets(
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    count: Annotated[int, Within(1, 10**6)] = 1,
    seed: Seed = 0,
    seconds: ClipSeconds = 5.16,
    split: Literal["train", "test"] = "train",
    size: PuppetSize = 96,
    duets: bool = False,
) -> None:
    """Draws talking puppets with the truth beside them.

    Each has a folder of its own: portrait.png, mask.png, speech.wav, prompt.txt, video.mp4, mouth.csv, attributes.json.
    A duet has mask_1.png and mask_2.png, and so on, from left to right.

    Args:
      out: the folder to write to.
      count: how many.
      seed: another seed draws other puppets; the same seed the same ones on every machine.
      seconds: length of each; the frames are the nearest number of the form 4k + 1.
      split: faces, voices and sentences to train on, or those held out.
      size: side of the picture in pixels.
      duets: two puppets in each picture.
    """
    with drawing():
        from mi_jax.puppets.clips import write_puppets

        work_begins()

        folders = write_puppets(out, count, seed, seconds, split=split, size=size, duets=duets)
    print(f"{out}: {len(folders)} clip{'s' * (len(folders) > 1)}")
