"""`mi-jax puppets`, `prepare` and `convert`: clips, records and model folders."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mi_jax.commands.terminal import ProgressBar
from mi_jax.errors import InputError


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Says what to install where the puppets' libraries are missing."""
    try:
        yield
    except ModuleNotFoundError as missing:
        raise InputError(f"puppets need {missing.name}: pip install 'mi-jax[puppets]'") from missing


def puppets(
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    count: int = 1,
    seed: int = 0,
    seconds: float = 5.16,
    split: Literal["train", "test"] = "train",
    size: int = 96,
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
    if not 16 <= size <= 1024:
        raise InputError(f"--size is {size}, must lie in 16 .. 1024")
    if seed < 0:
        raise InputError(f"--seed is {seed}, must not be negative")
    with drawing():
        from mi_jax.data.puppets import write_puppets

        folders = write_puppets(out, count, seed, seconds, split=split, size=size, duets=duets)
    print(f"{out}: {len(folders)} clip{'s' * (len(folders) > 1)}")


def prepare(
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")],
    puppets: Annotated[int, tyro.conf.arg(metavar="COUNT")],
    duets: int = 0,
    model: Annotated[str, tyro.conf.arg(metavar="puppet|DIR")] = "puppet",
    first: int = 0,
    seed: int = 0,
    split: Literal["train", "test"] = "train",
    seconds: float = 5.16,
    workers: int = 0,
) -> None:
    """Computes the features of clips once, as records to train on.

    Args:
      out: the folder to write; it must not exist yet.
      puppets: how many puppet clips to draw.
      duets: how many clips of two puppets to add, each with its own voice.
      model: whose encoders: a shipped model or a model folder (a denoiser is not needed).
      first: number of the first clip, and of the first duet.
      seed: of the puppets.
      split: faces, voices and sentences to train on, or those held out.
      seconds: length of each clip.
      workers: processes that draw ahead; 0 takes one per core.
    """
    if puppets < 1:
        raise InputError(f"--puppets is {puppets}, at least 1 is needed")
    for name, number in {"duets": duets, "first": first, "seed": seed, "workers": workers}.items():
        if number < 0:
            raise InputError(f"--{name} is {number}, must not be negative")
    import os

    from mi_jax.data.prepare import prepare_puppets
    from mi_jax.data.puppets import check_seconds
    from mi_jax.sample.folders import load_encoders

    check_seconds(seconds)
    config, encoders = load_encoders(model)
    if encoders.wav2vec2 is None or encoders.mllm.vision is None:
        raise InputError(f"{model}: records need a model that hears voices and sees portraits")
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
            size=config.height,
            workers=workers or os.cpu_count() or 1,
        )


def convert(
    family: tyro.conf.Positional[
        Annotated[
            Literal[
                "puppet",
                "hunyuan-video",
                "hunyuan-video-i2v",
                "magic-141",
                "hunyuan-vae",
                "llava-llama-3",
                "clip-text",
                "wav2vec2",
            ],
            tyro.conf.arg(metavar="FAMILY"),
        ]
    ],
    source: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="SOURCE")]],
    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]],
    extend: Literal["magic-infinite", "magic-infinite-stage1"] | None = None,
    vae: Path | None = None,
    text_encoder: Path | None = None,
    clip: Path | None = None,
    wav2vec2: Path | None = None,
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source",
    seed: int = 0,
    base: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Makes a model folder that `animate` reads from weights of another form.

    docs/weights.md says which public files become what.

    Args:
      family: whose weights: puppet (the runs of configs/puppet_*.py), a denoiser with the encoders beside it
        (hunyuan-video, hunyuan-video-i2v, magic-141), or one part (hunyuan-vae, llava-llama-3, clip-text, wav2vec2).
      source: a folder as its repository has it, or the file of the weights.
      out: the model folder to write.
      extend: makes a denoiser the start of MagicInfinite's training: with portrait and audio inputs that change
        nothing yet, or, for stage 1, without audio.
      vae: where HunyuanVideo's VAE is, if not in SOURCE.
      text_encoder: where the LLaVA (or Llama) is, if not in SOURCE.
      clip: where CLIP's text tower is, if not in SOURCE.
      wav2vec2: where wav2vec2 is, if not in SOURCE.
      dtype: of the weights written; by default that of the source.
      seed: of the weights that --extend adds.
      base: for puppet: a model folder whose encoders stand in for theirs that were not trained anew.
      overwrite: replace what is there.
    """
    given = {"vae": vae, "text_encoder": text_encoder, "clip_text": clip, "audio_encoder": wav2vec2}
    if family == "puppet":
        from mi_jax.train.export import export_puppet

        if extend or dtype != "source" or any(given.values()):
            raise InputError("convert puppet takes --base and --overwrite alone")
        whole = export_puppet(source, out, base=base, overwrite=overwrite)
        print(f"{out}: written" + f", encoders alone: there is no {source / 'stage2'}" * (not whole))
        return
    if base is not None:
        raise InputError(f"--base is for puppet, not for {family}")
    import jax.numpy as jnp

    from mi_jax.sample.convert import convert as run

    with ProgressBar("converting", "B", unit_scale=True) as bar:
        made = run(
            family,
            source,
            out,
            extend=extend,
            **given,
            dtype=None if dtype == "source" else jnp.dtype(dtype),
            seed=seed,
            overwrite=overwrite,
            progress=bar,
        )
    if made.unused:
        print(f"not used, {len(made.unused)}: {', '.join(made.unused)}")
    print(
        f"{out}: {', '.join(made.parts)}"
        + (f"; no whole avatar without {', '.join(made.missing)}" * bool(made.missing))
    )
