"""`mi-jax convert`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from mi_jax.bounds import Seed
from mi_jax.commands.terminal import ProgressBar
from mi_jax.errors import InputError


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
    seed: Seed = 0,
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
    paths = {"vae": vae, "text_encoder": text_encoder, "clip_text": clip, "audio_encoder": wav2vec2}
    if family == "puppet":
        from mi_jax.puppets.export import export_puppet

        if extend or dtype != "source" or any(paths.values()):
            raise InputError("convert puppet takes --base and --overwrite alone")
        whole = export_puppet(source, out, base=base, overwrite=overwrite)
        print(f"{out}: written" + f", encoders alone: there is no {source / 'stage2'}" * (not whole))
        return
    if base is not None:
        raise InputError(f"--base is for puppet, not for {family}")
    import jax.numpy as jnp

    from mi_jax.avatar.families import convert as run

    with ProgressBar("converting", "B", unit_scale=True) as bar:
        made = run(
            family,
            source,
            out,
            extend=extend,
            **paths,
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
