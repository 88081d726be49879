"""HunyuanVideo's denoisers: Tencent's names and diffusers', and their extension to MagicInfinite.

Sources: Tencent-Hunyuan/HunyuanVideo and HunyuanVideo-I2V (`hyvideo/modules/models.py`), whose names Magic-1-For-1
keeps; `HunyuanVideoTransformer3DModel` of diffusers. The two differ in how projections are joined, and in the order of
the last modulation: (shift, scale) with Tencent as here, (scale, shift) with diffusers.
"""

import dataclasses
import functools
import pathlib
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mi_jax.diffusion import TIMESTEPS
from mi_jax.errors import InputError
from mi_jax.models.audio_encoder import AudioEncoder, AudioEncoderConfig
from mi_jax.models.dit import DiT, DiTConfig
from mi_jax.models.dit_blocks import AudioAttention
from mi_jax.models.dit_text import TIMESTEP_DIM
from mi_jax.models.layers import sinusoid
from mi_jax.weights.configs import read_json, understood
from mi_jax.weights.rows import (
    Outputs,
    Part,
    Row,
    Table,
    Tensor,
    flat_inputs,
    fold_in,
    leaf_shapes,
    plan,
)
from mi_jax.weights.sources import Checkpoint, open_checkpoint

Family = Literal["hunyuan-video", "hunyuan-video-i2v", "magic-141"]

_WRAPPED = ("model.diffusion_model.", "model.model.", "module.", "model.")


def denoiser(path: pathlib.Path, family: Family) -> tuple[DiTConfig, Part]:
    """The config of a denoiser on disk, and where its leaves come from.

    `path` is a file or a folder. diffusers' config.json stands beside the weights; with Tencent's names everything is
    read from the shapes, and 16 input channels of a hunyuan-video-i2v mean token replace.

    Raises:
      InputError: the names are neither Tencent's nor diffusers', the model is not of `family`, or of no shape that
        `DiTConfig` describes.
    """
    checkpoint = open_checkpoint(path).under(*_WRAPPED)
    if "img_in.proj.weight" in checkpoint.tensors:
        config = _tencent_config(checkpoint, family)
        table = tencent_table(config)
    elif "x_embedder.proj.weight" in checkpoint.tensors:
        config = _diffusers_config(checkpoint)
        table = diffusers_table(config)
    else:
        raise InputError(
            f"{checkpoint.path}: no HunyuanVideo denoiser: neither img_in.proj.weight (Tencent's names) nor "
            "x_embedder.proj.weight (diffusers') is in it"
        )
    _check_family(checkpoint, config, family)
    shapes = leaf_shapes(lambda: DiT(config, rngs=nnx.Rngs(0)))
    return config, Part("dit", checkpoint, shapes, plan(shapes, table))


# --- names ---------------------------------------------------------------------------------------------------------


def tencent_table(config: DiTConfig) -> Table:
    """Our modules -> those of `HYVideoDiffusionTransformer`."""
    width = config.width
    table: dict[str, str | Outputs | Tensor] = {
        "image_in.kernel": Tensor(("img_in.proj.weight",), flat_inputs),
        "image_in": "img_in.proj",
        "time_in.fc1": "time_in.mlp.0",
        "time_in.fc2": "time_in.mlp.2",
        "pooled_in.fc1": "vector_in.in_layer",
        "pooled_in.fc2": "vector_in.out_layer",
        "guidance_in.fc1": "guidance_in.mlp.0",
        "guidance_in.fc2": "guidance_in.mlp.2",
        "text_in.embed": "txt_in.input_embedder",
        "text_in.time.fc1": "txt_in.t_embedder.mlp.0",
        "text_in.time.fc2": "txt_in.t_embedder.mlp.2",
        "text_in.mean.fc1": "txt_in.c_embedder.linear_1",
        "text_in.mean.fc2": "txt_in.c_embedder.linear_2",
        "final.modulation.linear": "final_layer.adaLN_modulation.1",
        "final.out": "final_layer.linear",
    }
    block = "txt_in.individual_token_refiner.blocks.{i}"
    for ours, theirs in {
        "norm1": "norm1",
        "qkv": "self_attn_qkv",
        "out": "self_attn_proj",
        "norm2": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
        "gates.linear": "adaLN_modulation.1",
    }.items():
        table[f"text_in.blocks.{ours}"] = f"{block}.{theirs}"
    for stream, name in {"video": "img", "text": "txt"}.items():
        for ours, theirs in {
            "modulation.linear": "mod.linear",
            "qkv.proj": "attn_qkv",
            "qkv.q_norm": "attn_q_norm",
            "qkv.k_norm": "attn_k_norm",
            "out": "attn_proj",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        }.items():
            table[f"double.blocks.{stream}.{ours}"] = f"double_blocks.{{block}}.{name}_{theirs}"
    block = "single_blocks.{block}"
    return table | {
        "single.blocks.modulation.linear": f"{block}.modulation.linear",
        "single.blocks.qkv.proj": Outputs((f"{block}.linear1",), lambda x: x[: 3 * width]),
        "single.blocks.qkv.q_norm": f"{block}.q_norm",
        "single.blocks.qkv.k_norm": f"{block}.k_norm",
        "single.blocks.mlp_in": Outputs((f"{block}.linear1",), lambda x: x[3 * width :]),
        "single.blocks.out": f"{block}.linear2",
    }


def diffusers_table(config: DiTConfig) -> Table:
    """Our modules -> those of `HunyuanVideoTransformer3DModel`."""
    table: dict[str, str | Outputs | Tensor] = {
        "image_in.kernel": Tensor(("x_embedder.proj.weight",), flat_inputs),
        "image_in": "x_embedder.proj",
        "text_in.embed": "context_embedder.proj_in",
        "final.modulation.linear": Outputs(("norm_out.linear",), _swap_halves),
        "final.out": "proj_out",
    }
    for ours, theirs in {
        "time_in": "time_text_embed.timestep_embedder",
        "pooled_in": "time_text_embed.text_embedder",
        "guidance_in": "time_text_embed.guidance_embedder",
        "text_in.time": "context_embedder.time_text_embed.timestep_embedder",
        "text_in.mean": "context_embedder.time_text_embed.text_embedder",
    }.items():
        table |= {f"{ours}.fc1": f"{theirs}.linear_1", f"{ours}.fc2": f"{theirs}.linear_2"}

    def side_by_side(block: str, *names: str) -> Outputs:
        return Outputs(tuple(f"{block}.attn.{name}" for name in names))

    block = "context_embedder.token_refiner.refiner_blocks.{i}"
    table |= {
        "text_in.blocks.norm1": f"{block}.norm1",
        "text_in.blocks.qkv": side_by_side(block, "to_q", "to_k", "to_v"),
        "text_in.blocks.out": f"{block}.attn.to_out.0",
        "text_in.blocks.norm2": f"{block}.norm2",
        "text_in.blocks.mlp.fc1": f"{block}.ff.net.0.proj",
        "text_in.blocks.mlp.fc2": f"{block}.ff.net.2",
        "text_in.blocks.gates.linear": f"{block}.norm_out.linear",
    }
    block = "transformer_blocks.{block}"
    table |= {
        "double.blocks.video.modulation.linear": f"{block}.norm1.linear",
        "double.blocks.video.qkv.proj": side_by_side(block, "to_q", "to_k", "to_v"),
        "double.blocks.video.qkv.q_norm": f"{block}.attn.norm_q",
        "double.blocks.video.qkv.k_norm": f"{block}.attn.norm_k",
        "double.blocks.video.out": f"{block}.attn.to_out.0",
        "double.blocks.video.mlp.fc1": f"{block}.ff.net.0.proj",
        "double.blocks.video.mlp.fc2": f"{block}.ff.net.2",
        "double.blocks.text.modulation.linear": f"{block}.norm1_context.linear",
        "double.blocks.text.qkv.proj": side_by_side(block, "add_q_proj", "add_k_proj", "add_v_proj"),
        "double.blocks.text.qkv.q_norm": f"{block}.attn.norm_added_q",
        "double.blocks.text.qkv.k_norm": f"{block}.attn.norm_added_k",
        "double.blocks.text.out": f"{block}.attn.to_add_out",
        "double.blocks.text.mlp.fc1": f"{block}.ff_context.net.0.proj",
        "double.blocks.text.mlp.fc2": f"{block}.ff_context.net.2",
    }
    block = "single_transformer_blocks.{block}"
    return table | {
        "single.blocks.modulation.linear": f"{block}.norm.linear",
        "single.blocks.qkv.proj": side_by_side(block, "to_q", "to_k", "to_v"),
        "single.blocks.qkv.q_norm": f"{block}.attn.norm_q",
        "single.blocks.qkv.k_norm": f"{block}.attn.norm_k",
        "single.blocks.mlp_in": f"{block}.proj_mlp",
        "single.blocks.out": f"{block}.proj_out",
    }


def _swap_halves(x: np.ndarray) -> np.ndarray:
    return np.concatenate(np.split(x, 2)[::-1])


# --- configs -------------------------------------------------------------------------------------------------------


def _tencent_config(checkpoint: Checkpoint, family: Family) -> DiTConfig:
    with understood(checkpoint.path, "tensors of no shapes that a HunyuanVideo has"):
        return _config_of_shapes(checkpoint, family)


def _config_of_shapes(checkpoint: Checkpoint, family: Family) -> DiTConfig:
    shape = checkpoint.shape
    width, channels, *patch = shape("img_in.proj.weight")
    head_dim = shape("double_blocks.0.img_attn_q_norm.weight")[0]
    latent_channels = shape("final_layer.linear.weight")[0] // int(np.prod(patch))
    return DiTConfig(
        latent_channels=latent_channels,
        image_to_video=channels == 2 * latent_channels + 1,
        token_replace=family == "hunyuan-video-i2v" and channels == latent_channels,
        patch=tuple(patch),
        width=width,
        heads=width // head_dim,
        mlp_ratio=shape("double_blocks.0.img_mlp.fc1.weight")[0] // width,
        double_depth=checkpoint.count("double_blocks."),
        single_depth=checkpoint.count("single_blocks."),
        refiner_depth=checkpoint.count("txt_in.individual_token_refiner.blocks."),
        text_dim=shape("txt_in.input_embedder.weight")[1],
        pooled_dim=shape("vector_in.in_layer.weight")[1],
        guidance_embedding="guidance_in.mlp.0.weight" in checkpoint.tensors,
        # Of both of Tencent's sizes: 16 + 56 + 56 and 12 + 42 + 42.
        rope_axes=(head_dim // 8, 7 * head_dim // 16, 7 * head_dim // 16),
    )


def _diffusers_config(checkpoint: Checkpoint) -> DiTConfig:
    path = checkpoint.path.parent / "config.json"
    theirs = read_json(path)
    with understood(path, "not the config of HunyuanVideoTransformer3DModel"):
        condition, channels = theirs.get("image_condition_type"), theirs["in_channels"]
        if condition not in (None, "latent_concat", "token_replace"):
            raise InputError(f"image_condition_type {condition!r} is not known")
        latent_channels = theirs.get("out_channels") or channels
        return DiTConfig(
            latent_channels=latent_channels,
            # Before image_condition_type there was concatenation alone.
            image_to_video=condition == "latent_concat" or channels == 2 * latent_channels + 1,
            token_replace=condition == "token_replace",
            patch=(theirs["patch_size_t"], theirs["patch_size"], theirs["patch_size"]),
            width=theirs["num_attention_heads"] * theirs["attention_head_dim"],
            heads=theirs["num_attention_heads"],
            mlp_ratio=int(theirs["mlp_ratio"]),
            double_depth=theirs["num_layers"],
            single_depth=theirs["num_single_layers"],
            refiner_depth=theirs["num_refiner_layers"],
            text_dim=theirs["text_embed_dim"],
            pooled_dim=theirs["pooled_projection_dim"],
            guidance_embedding=theirs["guidance_embeds"],
            rope_axes=tuple(theirs["rope_axes_dim"]),
            rope_theta=float(theirs["rope_theta"]),
        )


def _check_family(checkpoint: Checkpoint, config: DiTConfig, family: Family) -> None:
    kinds = {
        "hunyuan-video": not (config.image_to_video or config.token_replace),
        "hunyuan-video-i2v": config.image_to_video or config.token_replace,
        "magic-141": config.image_to_video,
    }
    if not kinds[family]:
        if config.token_replace:
            what = "an image-to-video model that replaces the first frame's tokens"
        else:
            what = f"a model with {config.in_channels} input channels"
        fitting = [name for name, fits in kinds.items() if fits]
        raise InputError(f"{checkpoint.path}: {what} is no {family} (but {' or '.join(fitting)})")


# --- extension -----------------------------------------------------------------------------------------------------


def extend(config: DiTConfig, part: Part, audio: AudioEncoderConfig | None, *, seed: int = 0) -> tuple[DiTConfig, Part]:
    """A denoiser as the start of MagicInfinite's training: stage 2 with `audio`, stage 1 without.

    Portrait and mask get input channels of zeros. Audio attention and the audio encoder are drawn from `seed`, with
    zero outputs. An embedded guidance scale becomes a constant: that of scale 1, the model's own distribution, which
    training data has; it is added to the time embedding's bias. Tokens of the first frame are no longer replaced. So on
    the old inputs (guidance 1, a window that does not start with the portrait) the model computes what it did.
    """
    new = dataclasses.replace(config, image_to_video=True, token_replace=False, guidance_embedding=False, audio=audio)
    shapes = leaf_shapes(lambda: DiT(new, rngs=nnx.Rngs(0)))
    rows = [row for row in part.rows if row.leaf in shapes]
    added = (new.in_channels - config.in_channels) * new.patch[1] * new.patch[2]
    for i, row in enumerate(rows):
        if row.leaf == "image_in.kernel" and added:
            rows[i] = dataclasses.replace(row, make=functools.partial(_with_new_inputs, row.make, added))
        if row.leaf == "time_in.fc2.bias" and config.guidance_embedding:
            guidance = {r.leaf: r for r in part.rows if r.leaf.startswith("guidance_in.")}
            names = ("fc1.kernel", "fc1.bias", "fc2.kernel", "fc2.bias")
            folded = [guidance[f"guidance_in.{name}"] for name in names]
            sources = row.sources + tuple(source for r in folded for source in r.sources)
            rows[i] = dataclasses.replace(row, sources=sources, make=_with_guidance_of_one)
    if audio:
        rows += _new_audio(new, shapes, seed)
    return new, dataclasses.replace(part, shapes=shapes, rows=rows)


def _with_new_inputs(make, added: int, *sources: np.ndarray) -> np.ndarray:
    kernel = make(*sources)
    return np.concatenate([kernel, np.zeros((added, kernel.shape[1]), kernel.dtype)])


def _with_guidance_of_one(bias: np.ndarray, w1: np.ndarray, b1: np.ndarray, w2: np.ndarray, b2: np.ndarray):
    """`bias` plus the guidance embedding of scale 1, whose two layers are in PyTorch's layout."""
    scale = np.asarray(sinusoid(jnp.full((1,), TIMESTEPS), TIMESTEP_DIM), np.float64)[0]
    w1, b1, w2, b2 = (x.astype(np.float64) for x in (w1, b1, w2, b2))
    hidden = w1 @ scale + b1
    hidden = hidden / (1 + np.exp(-hidden))  # SiLU
    return (bias.astype(np.float64) + w2 @ hidden + b2).astype(np.float32)


def _new_audio(config: DiTConfig, shapes: dict[str, tuple[int, ...]], seed: int) -> list[Row]:
    rows = []
    encoder = fold_in(lambda rngs: AudioEncoder(config.audio, rngs=rngs), seed, 0)
    rows += [Row(f"audio_in.{leaf}", None, (), functools.partial(np.asarray, value)) for leaf, value in encoder.items()]
    for stack, body in enumerate(config.audio_after):
        depth = config.bodies(body)
        # Rows are made in this order, one body after the other: the last body drawn is kept for its leaves.
        draw = functools.lru_cache(1)(
            lambda i, stack=stack: fold_in(
                lambda rngs: AudioAttention(config, rngs=rngs), seed, 1 + stack * config.double_depth + i
            )
        )
        leaves = [leaf.removeprefix(f"{body}.audio.") for leaf in shapes if leaf.startswith(f"{body}.audio.")]
        rows += [
            Row(f"{body}.audio.{leaf}", i, (), lambda i=i, leaf=leaf, draw=draw: draw(i)[leaf])
            for i in range(depth)
            for leaf in leaves
        ]
    return rows
