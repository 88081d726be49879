"""Model folders: what an avatar's config.json says, and reading and writing the parts of one."""

import dataclasses
import importlib.resources
import math
import os
import pathlib
import tempfile
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class AvatarConfig:
    """config.json of a model folder: the sizes of the networks and how they are sampled.

    height, width: of the video in pixels; the networks run at the next multiple that they take (540: 544, cropped).
    steps, shift: Euler steps, and the shift of their noise levels towards 1.
    wav2vec2: None for a model that hears nothing.
    guidance_audio, guidance_text: default weights of `Guidance`; 0 for a distilled model.
    embedded_guidance: the scale that a denoiser with a guidance embedding is told (HunyuanVideo's 6).
    portrait_in_noise: share of the portrait's latents in the noise that sampling starts from (HunyuanVideo-I2V: 0.001).
    lead_in: video frames before the first one shown (HunyuanVideo-I2V with the portrait as channels: 4).
    dtype: of the denoiser and the MLLM; the VAE and wav2vec2 are f32.
    """

    dit: DiTConfig
    vae: VAEConfig
    wav2vec2: Wav2Vec2Config | None
    mllm: MLLMConfig
    height: int
    width: int
    steps: int
    shift: float
    guidance_audio: float = 0.0
    guidance_text: float = 0.0
    embedded_guidance: float = 6.0
    portrait_in_noise: float = 0.0
    lead_in: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"

    @classmethod
    def puppet(cls) -> "AvatarConfig":
        """What this project trains and ships: 96x96 puppets."""
        return cls(
            dit=DiTConfig.puppet(),
            vae=VAEConfig.puppet(),
            wav2vec2=Wav2Vec2Config.puppet(),
            mllm=MLLMConfig.puppet(),
            height=96,
            width=96,
            steps=25,
            shift=3.0,
            guidance_audio=1.0,
        )

    @classmethod
    def magic_infinite_13b(cls) -> "AvatarConfig":
        """The paper's model at 540x540, before distillation (HunyuanVideo's 50 steps and shift 7)."""
        return cls(
            dit=DiTConfig.magic_infinite_13b(),
            vae=VAEConfig.hunyuan_video(),
            wav2vec2=Wav2Vec2Config.base(),
            mllm=MLLMConfig.llava_llama3_8b(),
            height=540,
            width=540,
            steps=50,
            shift=7.0,
            guidance_audio=4.0,
            guidance_text=4.0,
            dtype="bfloat16",
        )

    def replace(self, **options) -> "AvatarConfig":
        """A copy with those of `options` that are not None.

        Raises:
          InputError: a video cannot be made so: no step, a weight that is no finite number, sides under one patch.
        """
        new = dataclasses.replace(self, **{name: value for name, value in options.items() if value is not None})
        if new.steps < 1:
            raise InputError(f"steps is {new.steps}, at least 1 is needed")
        weights = {"audio": new.guidance_audio, "text": new.guidance_text}
        if not all(map(math.isfinite, weights.values())):
            raise InputError(f"guidance weights must be finite numbers, got {weights}")
        least = new.vae.spatial_stride * max(new.dit.patch[1:])
        if min(new.height, new.width) < least:
            raise InputError(f"a video of {new.width}x{new.height} pixels cannot be made: at least {least} a side")
        return new

    @property
    def padded_size(self) -> tuple[int, int]:
        """Height and width that VAE and patches divide."""
        multiple = [self.vae.spatial_stride * patch for patch in self.dit.patch[1:]]
        return tuple(-(-side // m) * m for side, m in zip((self.height, self.width), multiple, strict=True))


def avatar_config(name: str | os.PathLike) -> AvatarConfig:
    """What the config.json of a whole avatar says; no weights are read.

    Raises:
      InputError: no such model, a folder of parts, or a config that is missing or damaged.
    """
    folder = find_model(name)
    said = read_config(folder)
    if said and said.keys() <= _PARTS.keys():
        raise InputError(f"{folder / CONFIG}: of a folder of parts ({', '.join(said)}), not of a whole avatar")
    return config_from_json(AvatarConfig, said, str(folder / CONFIG))


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
    dtype=np.float16,
    overwrite: bool = False,
) -> None:
    """Writes config.json, model.safetensors and the tokenizers' folders; without `dit`, what `load_encoders` reads."""
    with tempfile.TemporaryDirectory() as scratch:
        encoders.prompter.save(scratch)
        root = pathlib.Path(scratch)
        files = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
    parts = {name: getattr(encoders, name) for name in ("vae", "wav2vec2", "mllm")}
    parts = {name: module for name, module in parts.items() if module is not None}
    if dit is not None:
        parts["dit"] = dit
    save_model(folder, parts, config_to_json(config), dtype=dtype, files=files, overwrite=overwrite)


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
