"""`mi-jax export`."""

import logging
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mi_jax.bounds import Count, Guidance, SamplingSteps
from mi_jax.commands.terminal import ProgressBar, adaptations_of
from mi_jax.errors import InputError

SUFFIX = ".safetensors"

log = logging.getLogger("mi_jax")


def export(
    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN|MODEL")]],
    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="OUT")]],
    base: Annotated[str | None, tyro.conf.arg(metavar="puppet|DIR")] = None,
    checkpoint: Count | None = None,
    turn: str | None = None,
    merge_lora: tyro.conf.UseAppendAction[Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE[:WEIGHT]")]] = (),
    steps: SamplingSteps | None = None,
    guidance_audio: Guidance | None = None,
    guidance_text: Guidance | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    overwrite: bool = False,
) -> None:
    """Makes a model folder that `animate` reads from a training run.

    The averaged denoiser of a checkpoint of the run, and the encoders of a model folder. The run may go on
    meanwhile. Of a run that trains LoRA factors, OUT is either a model folder whose kernels they change, or (with a
    name that ends in .safetensors) a file of the factors, for `animate --lora`.

    Args:
      source: what `mi-jax train --out` wrote; or, to merge factors into it, a shipped model or a model folder.
      out: the model folder to write, or a .safetensors file of factors.
      base: the shipped model or model folder whose VAE, encoders, tokenizers and defaults of sampling are taken along,
        and, for a run that trains LoRA factors, whose denoiser they change.
      checkpoint: the step of the checkpoint; by default the latest that the run keeps.
      turn: whose parameters, where several parts are trained in turn; by default a student's.
      merge_lora: a file of LoRA factors that change the denoiser, with its weight, by default 1; may be given again.
      steps: denoising steps that the folder's config says; by default the run's own, or the base's.
      guidance_audio: as `steps`.
      guidance_text: as `steps`.
      dtype: of the denoiser's weights; by default that in which the base computes. Sums with factors are f32 before.
        Of a file of factors: by default float32.
      overwrite: replace what is there.
    """
    import jax.numpy as jnp

    from mi_jax.avatar.export import export_denoiser
    from mi_jax.avatar.folders import combined_factors, holds_model, open_folder, part_config
    from mi_jax.train.export import averaged_checkpoint, denoiser_config, sampled_in
    from mi_jax.weights.factors import combined, factors_of, save_factors

    if holds_model(source):
        if not merge_lora:
            raise InputError(f"{source}: a model already; --merge-lora says what to change, else give a training run")
        base, denoiser, dit, factors, sampling = source, None, None, {}, {}
    else:
        dit, sampling = denoiser_config(source), sampled_in(source)
        denoiser = averaged_checkpoint(source, turn, checkpoint)
        factors = {}
        if all(name.endswith((".down", ".up")) for name in denoiser.tensors):
            denoiser, factors = None, factors_of(denoiser)
    if out.suffix == SUFFIX:
        if not factors or merge_lora:
            raise InputError(f"{out}: a file of factors is made of a run that trains some, and of nothing else")
        if out.exists() and not overwrite:
            raise InputError(f"{out}: is there already; --overwrite replaces it")
        save_factors(out, factors, dtype=jnp.dtype(dtype or "float32"))
        print(f"{out}: written")
        return
    if base is None:
        raise InputError("--base says which model's VAE, encoders and tokenizers are taken along")
    if base != source:  # a run's denoiser, or its factors, take the place of the base's own
        base = open_folder(base).base or base
    if factors and part_config(base, "dit") != dit:
        log.warning("%s: %s is no denoiser of the config that the run adapts", source, base)
    if merge_lora:
        more = combined_factors(base, adaptations_of(merge_lora))
        factors = combined([(factors, 1.0), (more, 1.0)])
    chosen = {"steps": steps, "guidance_audio": guidance_audio, "guidance_text": guidance_text}
    with ProgressBar("exporting", "B", unit_scale=True) as bar:
        export_denoiser(
            denoiser,
            None if denoiser is None else dit,
            out,
            base=base,
            factors=factors,
            sampling=sampling | {name: value for name, value in chosen.items() if value is not None},
            dtype=dtype and jnp.dtype(dtype),
            overwrite=overwrite,
            progress=bar,
        )
    print(f"{out}: written")
