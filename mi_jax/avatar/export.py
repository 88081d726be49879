"""A trained denoiser becomes a model folder: its weights, row by row, beside the encoders of another folder."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from flax import nnx

from mi_jax.avatar.config import AvatarConfig
from mi_jax.avatar.folders import avatar_config, open_folder, stored_dtypes
from mi_jax.errors import InputError
from mi_jax.files import refuse_inside
from mi_jax.models.dit import DiT, DiTConfig
from mi_jax.models.lora import Factors
from mi_jax.weights.configs import config_to_json
from mi_jax.weights.native import CONFIG, INDEX, WEIGHTS
from mi_jax.weights.rows import Part, Row, leaf_shapes, write_model
from mi_jax.weights.sources import Checkpoint, open_checkpoint


def export_denoiser(
    denoiser: Checkpoint | None,
    dit: DiTConfig | None,
    out: str | os.PathLike,
    *,
    base: str | os.PathLike,
    factors: Mapping[str, Factors] | None = None,
    sampling: Mapping[str, Any] | None = None,
    dtype: Any = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> AvatarConfig:
    """Writes the model folder `out`: the denoiser of a checkpoint, named as our modules are, and all else of `base`.

    No model is built. The encoders keep the dtypes that `base` stores; `dtype` is the denoiser's, by default the one
    that the base computes it in.

    Args:
      denoiser, dit: None: the base's, without factors that it has itself.
      factors: by which the denoiser's kernels are changed; the sums are f32 until they are written.
      sampling: fields of the config by which it is sampled (steps, shift, guidance_audio, ...), where not the base's.

    Raises:
      InputError: no model `base`, or one whose encoders do not fit the denoiser; the checkpoint does not fit `dit`; or
        `out` cannot be written.
    """
    opened = open_folder(base)
    folder = opened.weights
    refuse_inside(out, folder, opened.path, denoiser and denoiser.path)
    config = avatar_config(base)
    config = dataclasses.replace(config if dit is None else _with_denoiser(config, dit, str(folder)), **sampling or {})
    stored = open_checkpoint(folder)
    shapes = leaf_shapes(lambda: DiT(config.dit, rngs=nnx.Rngs(0)))
    parts = [_as_it_is("dit", _part_of(stored, "dit") if denoiser is None else denoiser, shapes, factors)]
    for name in sorted({key.partition(".")[0] for key in stored.tensors}):
        if name != "dit" and getattr(config, name, None) is not None:
            part = _part_of(stored, name)
            parts.append(_as_it_is(name, part, {key: tensor.shape for key, tensor in part.tensors.items()}))
    files = {str(path.relative_to(folder)): path.read_bytes() for path in _others(folder)}
    write_model(
        out,
        parts,
        config_to_json(config),
        files=files,
        dtype={"dit": dtype or stored_dtypes(config)["dit"]},
        overwrite=overwrite,
        progress=progress,
    )
    return config


def _part_of(stored: Checkpoint, name: str) -> Checkpoint:
    own = {key.removeprefix(f"{name}."): x for key, x in stored.tensors.items() if key.startswith(f"{name}.")}
    return dataclasses.replace(stored, tensors=own)


def _as_it_is(
    name: str, checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]], factors: Mapping[str, Factors] | None = None
) -> Part:
    """All leaves of a checkpoint, kernels that have factors changed by them."""
    changed = {leaf: partial(_changed, pair) for leaf, pair in (factors or {}).items()}
    strangers = sorted(changed.keys() - shapes.keys())
    if strangers:
        raise InputError(f"{checkpoint.path}: has no kernels {', '.join(strangers)}, which the factors are of")
    return Part(name, checkpoint, shapes, [Row(leaf, None, (leaf,), changed.get(leaf, _same)) for leaf in shapes])


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _changed(pair: Factors, kernel: np.ndarray) -> np.ndarray:
    if (*pair.down.shape[:-1], pair.up.shape[-1]) != kernel.shape:
        raise InputError(
            f"factors of a kernel {(*pair.down.shape[:-1], pair.up.shape[-1])}, this one is {kernel.shape}"
        )
    return kernel.astype(np.float32) + np.asarray(pair.down) @ np.asarray(pair.up)


def _with_denoiser(config: AvatarConfig, dit: DiTConfig, base: str) -> AvatarConfig:
    """The base's config with another denoiser; one that hears nothing needs no wav2vec2."""
    fed = {
        "text tokens": (config.mllm.width, dit.text_dim),
        "a pooled vector": (config.mllm.pooled_width if dit.pooled_dim else None, dit.pooled_dim),
        "latent channels": (config.vae.latent_channels, dit.latent_channels),
    }
    if dit.audio is not None:
        if config.wav2vec2 is None:
            raise InputError(f"{base}: has no wav2vec2, and the denoiser has audio attention")
        fed["hidden states of wav2vec2"] = (
            (config.wav2vec2.num_hidden_states, config.wav2vec2.width),
            (dit.audio.layers, dit.audio.input_dim),
        )
    for what, (given, taken) in fed.items():
        if given != taken:
            raise InputError(f"{base}: gives {what} of {given}, the denoiser takes {taken}")
    return dataclasses.replace(config, dit=dit, wav2vec2=config.wav2vec2 if dit.audio else None)


def _others(folder: pathlib.Path) -> list[pathlib.Path]:
    """What a model folder holds beside config and weights: its tokenizers."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if path.name not in (CONFIG, INDEX, WEIGHTS) and path.suffix != ".safetensors"]
