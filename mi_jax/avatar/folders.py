"""Model folders: where they are, and reading and writing the parts of one."""

import importlib.resources
import os
import pathlib
import tempfile
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mi_jax.avatar.config import AvatarConfig
from mi_jax.data.features import Encoders
from mi_jax.errors import InputError
from mi_jax.models.clip import CLIPText, CLIPTextConfig
from mi_jax.models.dit import DiT, DiTConfig
from mi_jax.models.mllm import MLLM, MLLMConfig
from mi_jax.models.prompts import Prompter
from mi_jax.models.vae import VAE, VAEConfig
from mi_jax.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from mi_jax.weights.configs import config_from_json, config_to_json
from mi_jax.weights.native import CONFIG, load_into, read_config, save_model

_PARTS: dict[str, tuple[type, type]] = {
    "dit": (DiTConfig, DiT),
    "vae": (VAEConfig, VAE),
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2),
    "mllm": (MLLMConfig, MLLM),
    "clip_text": (CLIPTextConfig, CLIPText),
}


def avatar_config(name: str | os.PathLike) -> AvatarConfig:
    """What the config.json of a whole avatar says; no weights are read.

    Raises:
      InputError: no such model, a folder of parts, or a config that is missing or damaged.
    """
    folder = find_model(name)
    stored = read_config(folder)
    if stored and stored.keys() <= _PARTS.keys():
        raise InputError(f"{folder / CONFIG}: of a folder of parts ({', '.join(stored)}), not of a whole avatar")
    return config_from_json(AvatarConfig, stored, str(folder / CONFIG))


def load_encoders(name: str | os.PathLike, *, mesh: Mesh | None = None) -> tuple[AvatarConfig, Encoders]:
    """A model folder without its denoiser: what preparing records needs, and all there is before stage 1.

    Raises:
      InputError: as `load`.
    """
    folder, config = find_model(name), avatar_config(name)
    build = lambda kind, part: lambda: kind(part, rngs=nnx.Rngs(0))  # noqa: E731
    encoders = Encoders(
        vae=load_into(folder, "vae", build(VAE, config.vae)),
        wav2vec2=config.wav2vec2 and load_into(folder, "wav2vec2", build(Wav2Vec2, config.wav2vec2)),
        mllm=load_into(folder, "mllm", build(MLLM, config.mllm), dtype=jnp.dtype(config.dtype), mesh=mesh),
        prompter=Prompter.load(folder, config.mllm.prompts),
    )
    return config, encoders


def load_part(
    folder: str | os.PathLike, name: str, *, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> nnx.Module:
    """One module of a shipped model or a model folder: dit, vae, wav2vec2, mllm or clip_text; the others need
    not be there.

    Raises:
      InputError: the folder has no such part, or its files are missing, damaged or do not fit.
    """
    config = part_config(folder, name)
    module = _PARTS[name][1]
    return load_into(find_model(folder), name, lambda: module(config, rngs=nnx.Rngs(0)), dtype=dtype, mesh=mesh)


def part_config(folder: str | os.PathLike, name: str) -> Any:
    """What a model folder's config.json says of one module; no weights are read.

    Raises:
      InputError: no such model, or it has no such part, or its config is damaged.
    """
    where = find_model(folder) / CONFIG
    config = read_config(where.parent).get(name)
    if config is None:
        raise InputError(f"{where}: says nothing of {name!r}")
    return config_from_json(_PARTS[name][0], config, f"{where}: {name}")


def save_avatar(
    folder: str | os.PathLike,
    config: AvatarConfig,
    encoders: Encoders,
    dit: DiT | None,
    *,
    dtype: Any = None,
    overwrite: bool = False,
) -> None:
    """Writes config.json, model.safetensors and the tokenizers' folders; without `dit`, what `load_encoders` reads.

    dtype: of all floating weights; by default the denoiser and the MLLM are written as the config's, the others as f32
    (`stored_dtypes`).
    """
    with tempfile.TemporaryDirectory() as scratch:
        encoders.prompter.save(scratch)
        root = pathlib.Path(scratch)
        files = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
    parts = {name: getattr(encoders, name) for name in ("vae", "wav2vec2", "mllm")}
    parts = {name: module for name, module in parts.items() if module is not None}
    if dit is not None:
        parts["dit"] = dit
    save_model(
        folder, parts, config_to_json(config), dtype=dtype or stored_dtypes(config), files=files, overwrite=overwrite
    )


def stored_dtypes(config: AvatarConfig) -> dict[str, np.dtype]:
    """What the weights of each part are computed in, and so kept in."""
    own = np.dtype(jnp.dtype(config.dtype))
    return {name: own if name in ("dit", "mllm") else np.dtype(np.float32) for name in _PARTS}


def shipped_models() -> dict[str, pathlib.Path]:
    """The models inside the package, by name."""
    assets = pathlib.Path(str(importlib.resources.files("mi_jax") / "assets"))
    return {path.parent.name: path.parent for path in sorted(assets.glob("*/config.json"))}


def find_model(name: str | os.PathLike) -> pathlib.Path:
    """The folder of a shipped model, or `name` itself where it is a folder."""
    shipped = shipped_models()
    if str(name) in shipped:
        return shipped[str(name)]
    if pathlib.Path(name).is_dir():
        return pathlib.Path(name)
    known = ", ".join(shipped) or "none"
    raise InputError(f"{name}: no such model; shipped: {known}; or give a model folder")
