"""`mi-jax export`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from mi_jax.commands.terminal import ProgressBar


def export(
    run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]],
    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]],
    base: Annotated[str, tyro.conf.arg(metavar="puppet|DIR")],
    turn: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    overwrite: bool = False,
) -> None:
    """Makes a model folder that `animate` reads from a training run.

    The averaged denoiser of the run's latest checkpoint, and the encoders of a model folder. The run may go on
    meanwhile.

    Args:
      run: what `mi-jax train --out` wrote.
      out: the model folder to write.
      base: the shipped model or model folder whose VAE, encoders, tokenizers and defaults of sampling are taken along.
      turn: whose parameters, where several parts are trained in turn.
      dtype: of the denoiser's weights; by default that in which the base computes.
      overwrite: replace what is there.
    """
    import jax.numpy as jnp

    from mi_jax.avatar.export import export_denoiser
    from mi_jax.train.export import averaged_checkpoint, denoiser_config

    dit = denoiser_config(run)
    with ProgressBar("exporting", "B", unit_scale=True) as bar:
        export_denoiser(
            averaged_checkpoint(run, turn),
            dit,
            out,
            base=base,
            dtype=dtype and jnp.dtype(dtype),
            overwrite=overwrite,
            progress=bar,
        )
    print(f"{out}: written")
