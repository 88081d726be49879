"""From finished training runs to a model folder that `mi_jax.load` reads."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from mi_jax.avatar.config import AvatarConfig
from mi_jax.avatar.folders import load_encoders, save_avatar
from mi_jax.data.features import Encoders
from mi_jax.errors import InputError
from mi_jax.files import refuse_inside
from mi_jax.puppets.attributes import AttributeObjective, puppet_prompter
from mi_jax.puppets.clips import draw
from mi_jax.puppets.phonemes import PhonemeObjective
from mi_jax.puppets.vae import VAEObjective, measure_scaling_factor
from mi_jax.train.checkpoints import load_ema
from mi_jax.train.curriculum import CurriculumObjective

SCALE_CLIPS = 32


def export_puppet(
    runs: str | Path, out: str | Path, *, base: str | Path | None = None, overwrite: bool = False
) -> bool:
    """Writes the averaged parameters of runs/{vae,wav2vec2,mllm,stage2} as one model folder, in f16.

    An encoder whose run is missing is that of the model folder `base`. Without runs/stage2 the folder holds the
    encoders alone, which is what `mi-jax prepare` needs before stage 1. A trained VAE's scaling factor is measured
    here, so that the denoiser sees latents of unit standard deviation.

    Returns:
      whether there is a denoiser.

    Raises:
      InputError: no folder `runs`, or a run in it is unfinished, or missing and not in `base` either, or `out` cannot
        be written.
    """
    runs = Path(runs)
    if not runs.is_dir():
        raise InputError(f"{runs}: no such folder of runs")
    refuse_inside(out, runs)
    config, parts = AvatarConfig.puppet(), {}
    if base is not None:
        base_config, encoders = load_encoders(base)
        config = dataclasses.replace(config, vae=base_config.vae, wav2vec2=base_config.wav2vec2, mllm=base_config.mllm)
        parts = {field.name: getattr(encoders, field.name) for field in dataclasses.fields(encoders)}
    if (runs / "vae").is_dir():
        vae = parts["vae"] = load_ema(runs / "vae", _vae_objective(runs / "vae"))
        clips = (draw(i, seed=1, seconds=0.68).video for i in range(SCALE_CLIPS))
        scale = round(measure_scaling_factor(vae, clips), 4)
        config = dataclasses.replace(config, vae=dataclasses.replace(vae.config, scaling_factor=scale))
    if (runs / "wav2vec2").is_dir():
        parts["wav2vec2"] = load_ema(runs / "wav2vec2", PhonemeObjective()).wav2vec2
    if (runs / "mllm").is_dir():
        objective = AttributeObjective()
        parts["mllm"] = load_ema(runs / "mllm", objective).mllm
        parts["prompter"] = puppet_prompter(objective.mllm)
    for name in ("vae", "wav2vec2", "mllm"):
        if name not in parts:
            raise InputError(f"{runs / name}: no such run; train it with configs/puppet_{name}.py, or give --base")
    dit = None
    if (runs / "stage2").is_dir():
        dit = load_ema(runs / "stage2", CurriculumObjective(dit=config.dit, records=""))
    save_avatar(out, config, Encoders(**parts), dit, dtype=np.float16, overwrite=overwrite)
    return dit is not None


def _vae_objective(run: Path) -> VAEObjective:
    """As far as it says which parameters the run trained, and where the others come from."""
    try:
        objective = json.loads((run / "config.json").read_text())["objective"]
        return VAEObjective(init_from=objective.get("init_from"), decoder_only=objective.get("decoder_only", False))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{run}/config.json: not the config of a VAE's run ({error})") from None
