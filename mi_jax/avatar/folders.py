"""Model folders: where they are, and reading and writing the parts of one."""

import dataclasses
import importlib.resources
import os
import pathlib
import tempfile
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mi_jax.avatar.config import AvatarConfig
from mi_jax.bounds import shown
from mi_jax.data.features import Encoders
from mi_jax.errors import InputError
from mi_jax.files import existing_file, reason
from mi_jax.mesh import on_mesh, shard_parameters
from mi_jax.models.clip import CLIPText, CLIPTextConfig
from mi_jax.models.dit import DiT, DiTConfig
from mi_jax.models.lora import Factors
from mi_jax.models.mllm import MLLM, MLLMConfig
from mi_jax.models.prompts import TOKENIZERS, Prompter
from mi_jax.models.vae import VAE, VAEConfig
from mi_jax.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from mi_jax.untrusted import check_folder
from mi_jax.weights.configs import config_from_json, config_to_json
from mi_jax.weights.factors import Adaptation, adapted, check_factors, combined, read_adaptations
from mi_jax.weights.native import CONFIG, check_weights, is_model, load_into, load_state, read_config, save_model

_PARTS: dict[str, tuple[type, type]] = {
    "dit": (DiTConfig, DiT),
    "vae": (VAEConfig, VAE),
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2),
    "mllm": (MLLMConfig, MLLM),
    "clip_text": (CLIPTextConfig, CLIPText),
}


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model folder as it is read. One may be another with LoRA factors on its denoiser, and sampled in its own way:

        {"base": "puppet-teacher", "lora": ["four-steps.safetensors"], "steps": 4, "guidance_audio": 0.0}

    path: the folder. config: what its config.json says, or its base's with what it says instead. weights: the folder
    of weights and tokenizers. base: the shipped model of that, None where the folder has all itself. lora: files of
    factors in `path`.
    """

    path: pathlib.Path
    config: dict[str, Any]
    weights: pathlib.Path
    base: str | None = None
    lora: tuple[pathlib.Path, ...] = ()


def open_folder(name: str | os.PathLike) -> ModelFolder:
    """Where what is of a model lies; no weights are read.

    Raises:
      InputError: no such model; a config that is missing or damaged, or whose base is no shipped model that has its own
        weights, or whose factors are not in the folder.
    """
    path = find_model(name)
    stored = read_config(path)
    if "base" not in stored:
        return ModelFolder(path, stored, path)
    base, files = stored.pop("base"), stored.pop("lora", [])
    weights = shipped_models().get(base) if isinstance(base, str) else None
    if weights is None or "base" in (of_base := read_config(weights)):
        raise InputError(f"{path / CONFIG}: base is {shown(base)}, no shipped model with weights of its own")
    if not isinstance(files, list) or not all(
        isinstance(file, str) and pathlib.PurePath(file).name == file for file in files
    ):
        raise InputError(f"{path / CONFIG}: lora is {shown(files)}, must be a list of files in the folder")
    return ModelFolder(path, of_base | stored, weights, base, tuple(path / file for file in files))


def avatar_config(name: str | os.PathLike) -> AvatarConfig:
    """What the config.json of a whole avatar says; no weights are read.

    Raises:
      InputError: no such model, a folder of parts, or a config that is missing or damaged.
    """
    folder = open_folder(name)
    if folder.config and folder.config.keys() <= _PARTS.keys():
        parts = ", ".join(folder.config)
        raise InputError(f"{folder.path / CONFIG}: of a folder of parts ({parts}), not of a whole avatar")
    return config_from_json(AvatarConfig, folder.config, folder.path / CONFIG)


def load_encoders(name: str | os.PathLike, *, mesh: Mesh | None = None) -> tuple[AvatarConfig, Encoders]:
    """A model folder without its denoiser: what preparing records needs, and all there is before stage 1.

    Raises:
      InputError: as `load`.
    """
    return _load(name, ("vae", "wav2vec2", "mllm"), mesh)[:2]


def load_models(
    name: str | os.PathLike, *, lora: Sequence[Adaptation] = (), mesh: Mesh | None = None
) -> tuple[AvatarConfig, Encoders, DiT]:
    """All of a model folder, its denoiser adapted by files of LoRA factors. Its tokenizers are read first, and every
    weight is known to be there in its shape before the first one is read.

    Raises:
      InputError: as `load`.
    """
    factors = combined_factors(name, lora)
    config, encoders, modules = _load(name, ("vae", "wav2vec2", "mllm", "dit"), mesh)
    return config, encoders, _adapted(modules["dit"], factors, config.dtype, mesh)


def _adapted(dit: DiT, factors: dict[str, Factors], dtype: Any, mesh: Mesh | None) -> DiT:
    if not factors:
        return dit
    factors = jax.tree.map(jnp.asarray, factors) if mesh is None else shard_parameters(factors, mesh)
    with on_mesh(mesh):
        return adapted(dit, factors, dtype)


def combined_factors(name: str | os.PathLike, lora: Sequence[Adaptation] = ()) -> dict[str, Factors]:
    """Files of LoRA factors, with their weights, as one adaptation of a model's denoiser, after the model's own.

    Raises:
      InputError: a file is missing, damaged or made for another model.
    """
    lora = [*open_folder(name).lora, *lora]
    if not lora:
        return {}
    shapes = nnx.state(_without_arrays("dit", part_config(name, "dit"), find_model(name)))
    read = read_adaptations(lora)
    for (factors, _), entry in zip(read, lora, strict=True):
        check_factors(shapes, factors, str(entry[0] if isinstance(entry, tuple) else entry))
    return combined(read)


def _load(
    name: str | os.PathLike, parts: Sequence[str], mesh: Mesh | None
) -> tuple[AvatarConfig, Encoders, dict[str, nnx.Module]]:
    folder, config = open_folder(name).weights, avatar_config(name)
    prompter = Prompter.load(folder, config.mllm.prompts)
    wanted = {part: part_config for part in parts if (part_config := getattr(config, part)) is not None}
    modules = {part: _without_arrays(part, part_config, folder) for part, part_config in wanted.items()}
    check_weights(folder, modules)
    for part, module in modules.items():
        options = {"dtype": jnp.dtype(config.dtype), "mesh": mesh} if part in ("dit", "mllm") else {}
        modules[part] = load_into(folder, part, module, **options)
    vae, wav2vec2, mllm = (modules.get(part) for part in ("vae", "wav2vec2", "mllm"))
    return config, Encoders(vae=vae, wav2vec2=wav2vec2, mllm=mllm, prompter=prompter), modules


def _without_arrays(name: str, config: Any, folder: pathlib.Path) -> nnx.Module:
    """The structure of a module, which takes no memory however large its config says it is."""
    try:
        return nnx.eval_shape(lambda: _PARTS[name][1](config, rngs=nnx.Rngs(0)))
    except (ArithmeticError, LookupError, TypeError, ValueError) as fault:
        raise InputError(f"{folder / CONFIG}: {name} cannot be of these sizes ({reason(fault)})") from None


def load_part(
    folder: str | os.PathLike, name: str, *, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> nnx.Module:
    """One module of a shipped model or a model folder: dit, vae, wav2vec2, mllm or clip_text; the others need
    not be there.

    Raises:
      InputError: the folder has no such part, or its files are missing, damaged or do not fit.
    """
    config, opened = part_config(folder, name), open_folder(folder)
    module = load_into(opened.weights, name, _without_arrays(name, config, opened.path), dtype=dtype, mesh=mesh)
    return _adapted(module, combined_factors(folder), dtype, mesh) if name == "dit" else module


def part_state(folder: str | os.PathLike, name: str) -> Any:
    """Every leaf saved as `name` in a shipped model or a model folder (an nnx.State), f32, for a module that may have
    more of them.

    Raises:
      InputError: as `load_part`.
    """
    opened = open_folder(folder)
    if not opened.lora:
        return load_state(opened.weights, name)
    mesh = None if jax.sharding.get_abstract_mesh().empty else jax.sharding.get_mesh()
    return nnx.state(load_part(folder, name, mesh=mesh))


def part_config(folder: str | os.PathLike, name: str) -> Any:
    """What a model folder's config.json says of one module; no weights are read.

    Raises:
      InputError: no such model, or it has no such part, or its config is damaged.
    """
    opened = open_folder(folder)
    where, config = opened.path / CONFIG, opened.config.get(name)
    if config is None:
        raise InputError(f"{where}: says nothing of {name!r}")
    return config_from_json(_PARTS[name][0], config, where, name)


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


def holds_model(name: str | os.PathLike) -> bool:
    """Whether this is a shipped model or a folder of one (it need not be whole), not a training run."""
    path = pathlib.Path(name)
    if str(name) in shipped_models() or is_model(path):
        return True
    try:
        return path.is_dir() and "base" in read_config(path)
    except InputError:
        return False


def weights_described(name: str | os.PathLike, lora: Sequence[Adaptation] = ()) -> list[list]:
    """[file, bytes, checksum of its end] of a model's weights and of files of factors with their weights: enough to
    tell that they are no others than before, without reading them all.

    Raises:
      InputError: no such model, or no such file.
    """
    folder = open_folder(name)
    files = sorted(folder.weights.glob("*.safetensors"))
    described = [[path.name, path.stat().st_size, _end_of(path)] for path in files]
    for entry in (*folder.lora, *lora):
        path, weight = entry if isinstance(entry, tuple) else (entry, 1.0)
        path = existing_file(path, "the file of LoRA factors")
        described.append([path.name, path.stat().st_size, _end_of(path), weight])
    return described


def _end_of(path: pathlib.Path, length: int = 2**16) -> int:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - length))
        return zlib.crc32(file.read())


def find_model(name: str | os.PathLike) -> pathlib.Path:
    """The folder of a shipped model, or `name` itself where it is a folder.

    Raises:
      InputError: there is neither, or the folder or a tokenizer in it holds code (`check_folder`).
    """
    shipped = shipped_models()
    if str(name) in shipped:
        return shipped[str(name)]
    if pathlib.Path(name).is_dir():
        folder = pathlib.Path(name)
        for place in (folder, *filter(pathlib.Path.is_dir, (folder / tokenizer for tokenizer in TOKENIZERS))):
            check_folder(place)
        return folder
    known = ", ".join(shipped) or "none"
    raise InputError(f"{name}: no such model; shipped: {known}; or give a model folder")
