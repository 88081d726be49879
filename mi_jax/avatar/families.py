"""Public weights become a model folder: finds a family's parts in a folder and puts them together.

Which files of which repository these are stands in docs/weights.md.
"""

import dataclasses
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax.numpy as jnp

from mi_jax.avatar.config import AvatarConfig
from mi_jax.errors import InputError
from mi_jax.files import refuse_inside
from mi_jax.models.audio_encoder import AudioEncoderConfig
from mi_jax.models.clip import CLIPTextConfig
from mi_jax.models.dit import DiTConfig
from mi_jax.models.mllm import MLLMConfig
from mi_jax.models.prompts import IMAGE_TOKEN, TOKENIZERS, PromptConfig, read_tokenizer
from mi_jax.untrusted import check_folder
from mi_jax.weights import clip, hunyuan_vae, hunyuan_video, llava, wav2vec2
from mi_jax.weights.configs import config_to_json
from mi_jax.weights.rows import Part, write_model
from mi_jax.weights.sources import has_checkpoint

log = logging.getLogger("mi_jax")

Family = Literal[
    "hunyuan-video", "hunyuan-video-i2v", "magic-141", "hunyuan-vae", "llava-llama-3", "clip-text", "wav2vec2"
]
Extension = Literal["magic-infinite", "magic-infinite-stage1"]
DENOISERS = ("hunyuan-video", "hunyuan-video-i2v", "magic-141")

_TENCENT = ("hunyuan-video-t2v-720p", "hunyuan-video-i2v-720p")
_PLACES = {
    "dit": ("transformer", "transformers", *(f"{name}/transformers" for name in _TENCENT)),
    "vae": ("vae", *(f"{name}/vae" for name in _TENCENT)),
    "text_encoder": ("text_encoder", "text_encoder_i2v"),
    "clip": ("text_encoder_2",),
    "wav2vec2": ("wav2vec2",),
}


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a conversion made.

    parts: names of the modules written. missing: those that a whole avatar would need besides. unused: source tensors
    that are known to have no place in our modules.
    """

    parts: Sequence[str]
    missing: Sequence[str]
    unused: Sequence[str]


@dataclasses.dataclass
class _Collected:
    """Parts of the model folder, as they are collected."""

    parts: list[Part] = dataclasses.field(default_factory=list)
    configs: dict[str, Any] = dataclasses.field(default_factory=dict)
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)


def convert(
    family: Family,
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    extend: Extension | None = None,
    vae: str | os.PathLike | None = None,
    text_encoder: str | os.PathLike | None = None,
    clip_text: str | os.PathLike | None = None,
    audio_encoder: str | os.PathLike | None = None,
    dtype: Any = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Converted:
    """Writes the model folder `out` from public weights.

    A family of denoisers takes along the encoders that stand in `source` in their usual places (those of diffusers'
    folders and of Tencent's `ckpts`), or at the places given. With all of them `mi_jax.load` reads the folder; with
    fewer, `mi_jax.avatar.folders.load_part` reads each part. The other families are one part.

    Args:
      family: what `source` holds.
      source: a folder, or the file of a denoiser's weights.
      extend: makes the denoiser the start of MagicInfinite's training (`hunyuan_video.extend`).
      vae, text_encoder, clip_text, audio_encoder: where these are, if not in `source`.
      dtype: of the stored weights; by default that of the source.
      seed: of the weights that an extension adds.
      progress: called with (bytes written, bytes in all).

    Raises:
      InputError: a part is missing, damaged or of another family, or `out` cannot be written.
    """
    source, collected = pathlib.Path(source), _Collected()
    paths = {"vae": vae, "text_encoder": text_encoder, "clip": clip_text, "wav2vec2": audio_encoder}
    refuse_inside(out, source, *paths.values())
    if family not in DENOISERS:
        _check_folders([source, *paths.values()])
        _one_part(family, source, paths, extend, collected)
        missing = []
    else:
        places = {name: _place(source, name, paths.get(name), family, extend) for name in _PLACES}
        _check_folders([places["dit"] or source, *places.values()])
        _denoiser(family, places["dit"] or source, places, extend, seed, collected)
        missing = [name for name in _needed(collected.configs["dit"]) if name not in collected.configs]
    config = {name: config_to_json(part) for name, part in collected.configs.items()}
    if family in DENOISERS and not missing:
        config = config_to_json(_avatar(collected, family, extend, dtype))
    unused = write_model(
        out, collected.parts, config, files=collected.files, dtype=dtype, overwrite=overwrite, progress=progress
    )
    for warning in collected.warnings:
        log.warning(warning)
    return Converted(list(collected.configs), missing, unused)


def _check_folders(parts: Iterable[str | os.PathLike | None]) -> None:
    """Whether the folders of all parts, and the tokenizers beside them, hold data alone: asked before the first one is
    opened."""
    for part in (pathlib.Path(part) for part in parts if part is not None):
        for folder in (part, *(part.parent / tokenizer for tokenizer in TOKENIZERS)):
            if folder.is_dir():
                check_folder(folder)


def _needed(dit: DiTConfig) -> tuple[str, ...]:
    return ("dit", "vae", "mllm", "wav2vec2") if dit.audio else ("dit", "vae", "mllm")


def _place(
    source: pathlib.Path, name: str, given: str | os.PathLike | None, family: Family, extend: Extension | None
) -> pathlib.Path | None:
    if given is not None:
        if not pathlib.Path(given).exists():
            raise InputError(f"{given}: no such file or folder")
        return pathlib.Path(given)
    # Tencent's folder may hold both models: each reads its own.
    other = "i2v" if family == "hunyuan-video" else "t2v"
    places = sorted(_PLACES[name], key=lambda place: other in place)
    if name == "dit":
        places = [place for place in places if other not in place]
    if name == "text_encoder" and (other == "t2v" or extend):
        places.reverse()  # the LLaVA, which sees portraits
    return next((source / place for place in places if has_checkpoint(source / place)), None)


def _one_part(family: Family, source: pathlib.Path, paths: dict[str, Any], extend: Any, collected: _Collected) -> None:
    allowed = {"clip"} if family == "llava-llama-3" else set()
    extra = [name.replace("_", "-") for name, path in paths.items() if path is not None and name not in allowed]
    if extra or extend:
        what = f"--{extra[0]}" if extra else "--extend"
        raise InputError(f"{family}: {what} belongs to a denoiser ({', '.join(DENOISERS)})")
    if family == "hunyuan-vae":
        collected.configs["vae"], part = hunyuan_vae.vae(source)
        collected.parts.append(part)
    elif family == "wav2vec2":
        collected.configs["wav2vec2"], part = wav2vec2.wav2vec2(source)
        collected.parts.append(part)
    elif family == "clip-text":
        collected.configs["clip_text"], part = clip.text_tower(source)
        collected.parts.append(part)
    else:
        _mllm(source, paths["clip"] and pathlib.Path(paths["clip"]), {}, collected)


def _denoiser(
    family: Family,
    path: pathlib.Path,
    places: dict[str, Any],
    extend: Extension | None,
    seed: int,
    collected: _Collected,
) -> None:
    config, part = hunyuan_video.denoiser(path, family)
    if places["wav2vec2"]:
        collected.configs["wav2vec2"], audio_part = wav2vec2.wav2vec2(places["wav2vec2"])
        collected.parts.append(audio_part)
    # HunyuanVideo reads Llama two layers before its end, Magic-1-For-1 the last state; concatenation came with every
    # second image token, the others with every fourth (facts of their public code).
    read = {
        "hidden_state_skip_layer": 0 if family == "magic-141" else 2,
        "image_token_stride": 2 if family == "hunyuan-video-i2v" and config.image_to_video and not extend else 4,
    }
    if extend:
        audio = None
        if extend == "magic-infinite":
            encoder = collected.configs.get("wav2vec2")
            audio = AudioEncoderConfig.base()
            if encoder:
                audio = dataclasses.replace(audio, input_dim=encoder.width, layers=encoder.num_hidden_states)
        config, part = hunyuan_video.extend(config, part, audio, seed=seed)
    collected.configs["dit"] = config
    collected.parts.append(part)
    if places["vae"]:
        collected.configs["vae"], part = hunyuan_vae.vae(places["vae"])
        collected.parts.append(part)
    vision = places["text_encoder"] and llava.llava(places["text_encoder"])[0]
    if extend and places["text_encoder"] and not vision:
        collected.warnings.append(
            f"{places['text_encoder']}: a Llama without a vision tower, left out: MagicInfinite reads portraits "
            "with a LLaVA (--text-encoder)"
        )
    elif places["text_encoder"]:
        if config.pooled_dim and not places["clip"]:
            raise InputError(f"{places['text_encoder']}: found, but no text tower of CLIP (text_encoder_2) beside it")
        _mllm(places["text_encoder"], places["clip"], read, collected)
        mllm = collected.configs["mllm"]
        if (mllm.width, mllm.pooled_width) != (config.text_dim, config.pooled_dim):
            raise InputError(
                f"{path}: reads text tokens of {config.text_dim} and a pooled vector of {config.pooled_dim}, the text "
                f"encoders give {mllm.width} and {mllm.pooled_width}"
            )
        if mllm.vision is None and (config.image_to_video or config.token_replace):
            raise InputError(
                f"{places['text_encoder']}: a Llama without a vision tower, but {path} makes videos of portraits"
            )
        latents = collected.configs["vae"].latent_channels if "vae" in collected.configs else config.latent_channels
        if latents != config.latent_channels:
            raise InputError(f"{path}: takes latents of {config.latent_channels} channels, the VAE's have {latents}")


def _mllm(path: pathlib.Path, clip_path: pathlib.Path | None, read: dict[str, int], collected: _Collected) -> None:
    """Text encoder and CLIP's text tower as one module, with their tokenizers."""
    vision, language, image_token_id, part = llava.llava(path)
    prompts = PromptConfig.hunyuan_video()
    if vision is not None:
        prompts = dataclasses.replace(prompts, image_tokens=vision.num_patches, image_token_id=image_token_id)
        part = dataclasses.replace(part, name="mllm")
    else:
        part = _under(part, "mllm", "language")
    collected.parts.append(part)
    tokenizer, files = _tokenizer(path, "tokenizer")
    collected.warnings += _check_llama_tokenizer(path, tokenizer, prompts, None if vision is None else image_token_id)
    text: CLIPTextConfig | None = None
    if clip_path is not None:
        text, part = clip.text_tower(clip_path)
        collected.parts.append(_under(part, "mllm", "clip_text"))
        prompts = dataclasses.replace(prompts, clip_max_tokens=text.max_tokens, eos_token_id=text.eos_token_id)
        tokenizer, more = _tokenizer(clip_path, "tokenizer_2")
        if tokenizer.eos_token_id != text.eos_token_id:
            raise InputError(
                f"{clip_path}: its tokenizer ends texts with {tokenizer.eos_token_id}, CLIP with {text.eos_token_id}; "
                "the tokenizer's files (tokenizer.json, or vocab.json and merges.txt) are missing or another model's"
            )
        files |= more
    collected.configs["mllm"] = MLLMConfig(vision=vision, language=language, clip_text=text, prompts=prompts, **read)
    collected.files |= files


def _under(part: Part, name: str, module: str) -> Part:
    """The part as module `module` of the part `name`."""
    return dataclasses.replace(
        part,
        name=name,
        shapes={f"{module}.{leaf}": shape for leaf, shape in part.shapes.items()},
        rows=[dataclasses.replace(row, leaf=f"{module}.{row.leaf}") for row in part.rows],
    )


def _tokenizer(encoder: pathlib.Path, name: str) -> tuple[Any, dict[str, bytes]]:
    """The tokenizer beside an encoder (diffusers) or in its folder (transformers, Tencent), and the files of one."""
    folder = encoder if encoder.is_dir() else encoder.parent
    beside = folder.parent / name
    tokenizer = read_tokenizer(beside if beside.is_dir() else folder)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        files = {f"{name}/{p.name}": p.read_bytes() for p in sorted(pathlib.Path(scratch).iterdir()) if p.is_file()}
    return tokenizer, files


def _check_llama_tokenizer(
    path: pathlib.Path, tokenizer: Any, prompts: PromptConfig, image_token_id: int | None
) -> list[str]:
    """What to warn of. transformers makes a tokenizer of almost any folder: this one must know Llama 3's headers."""
    warnings = []
    if image_token_id is not None and tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != image_token_id:
        raise InputError(f"{path}: its tokenizer gives {IMAGE_TOKEN} no id {image_token_id}; it is not this model's")
    for token in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"):
        if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id):
            raise InputError(f"{path}: its tokenizer does not know {token}; it is not Llama 3's")
    for template in (prompts.text,) if image_token_id is None else (prompts.text, prompts.image):
        before = len(tokenizer(template.text.split("{}")[0])["input_ids"])
        if before != template.crop_start:
            warnings.append(
                f"{path}: prompts begin after {before} tokens of the template, not after HunyuanVideo's "
                f"{template.crop_start}: is its tokenizer another?"
            )
    return warnings


def _avatar(collected: _Collected, family: Family, extend: Extension | None, dtype: Any) -> AvatarConfig:
    """How a whole model is sampled by default: HunyuanVideo's 50 steps, shift 7 and embedded guidance 6. From a
    portrait: with a trace of it in the noise (`--i2v-stability`) and, where it is channels, without the first 4 frames.
    """
    stored = next(part.checkpoint.tensors for part in collected.parts if part.name == "dit")
    full = dtype == jnp.float32 if dtype else all(tensor.dtype == jnp.float32 for tensor in stored.values())
    preset = AvatarConfig.magic_infinite_13b()
    sampled = {"height": 720, "width": 1280, "guidance_audio": 0.0, "guidance_text": 0.0}
    if extend:
        sampled = {name: getattr(preset, name) for name in sampled}
    elif family == "magic-141":
        sampled |= {"height": 540, "width": 960}
    elif family == "hunyuan-video-i2v":
        sampled |= {"portrait_in_noise": 0.001, "lead_in": 4 if collected.configs["dit"].image_to_video else 0}
    return dataclasses.replace(
        preset,
        **{"wav2vec2": None, **collected.configs},
        **sampled,
        dtype="float32" if full else "bfloat16",
    )
