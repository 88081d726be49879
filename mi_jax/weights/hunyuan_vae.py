"""HunyuanVideo's VAE: Tencent's `AutoencoderKLCausal3D`, diffusers' `AutoencoderKLHunyuanVideo`; their names agree."""

import pathlib

import numpy as np
from flax import nnx

from mi_jax.errors import InputError
from mi_jax.models.vae import VAE, VAEConfig
from mi_jax.weights.configs import read_json, understood
from mi_jax.weights.rows import Outputs, Part, Table, Tensor, leaf_shapes, plan
from mi_jax.weights.sources import open_checkpoint


def vae(path: pathlib.Path) -> tuple[VAEConfig, Part]:
    """The config of a VAE on disk (config.json beside its weights), and where its leaves come from.

    Raises:
      InputError: there is no config, or it is that of another VAE.
    """
    checkpoint = open_checkpoint(path).under("vae.")
    where = checkpoint.path.parent / "config.json"
    theirs = read_json(where)
    with understood(where, "not the config of HunyuanVideo's VAE"):
        time = theirs.get("temporal_compression_ratio", theirs.get("time_compression_ratio", 4))
        space = theirs.get("spatial_compression_ratio", 8)
        widths, depth = tuple(theirs["block_out_channels"]), theirs["layers_per_block"]
        channels, groups, scale = theirs["latent_channels"], theirs["norm_num_groups"], theirs["scaling_factor"]
        if (time, space, len(widths)) != (4, 8, 4) or theirs.get("act_fn", "silu") != "silu":
            raise InputError("not HunyuanVideo's VAE, which has strides 4x8x8, four levels and SiLU")
        config = VAEConfig(
            latent_channels=channels,
            widths=widths,
            encoder_blocks=depth,
            decoder_blocks=depth + 1,
            norm_groups=groups,
            scaling_factor=scale,
        )
    shapes = leaf_shapes(lambda: VAE(config, rngs=nnx.Rngs(0)))
    return config, Part("vae", checkpoint, shapes, plan(shapes, vae_table(config)))


def vae_table(config: VAEConfig) -> Table:
    """Our modules -> those of the references."""
    table: dict[str, str | Outputs | Tensor] = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}

    def block(ours: str, theirs: str) -> None:
        for norm in ("norm1", "norm2"):
            table[f"{ours}.{norm}"] = f"{theirs}.{norm}"
        for conv in ("conv1", "conv2"):
            table[f"{ours}.{conv}"] = f"{theirs}.{conv}.conv"
        table[f"{ours}.shortcut"] = f"{theirs}.conv_shortcut.conv"

    levels = range(len(config.widths))
    for side, kind, resamplers, depth in (
        ("encoder", "down", "downs", config.encoder_blocks),
        ("decoder", "up", "ups", config.decoder_blocks),
    ):
        for ours, theirs in {
            "conv_in": "conv_in.conv",
            "norm_out": "conv_norm_out",
            "conv_out": "conv_out.conv",
        }.items():
            table[f"{side}.{ours}"] = f"{side}.{theirs}"
        block(f"{side}.mid.before", f"{side}.mid_block.resnets.0")
        block(f"{side}.mid.after", f"{side}.mid_block.resnets.1")
        attention = f"{side}.mid_block.attentions.0"
        table[f"{side}.mid.attention.norm"] = f"{attention}.group_norm"
        for ours, theirs in {"query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}.items():
            leaf = f"{side}.mid.attention.{ours}"
            table[f"{leaf}.kernel"] = Tensor((f"{attention}.{theirs}.weight",), _pointwise)
            table[leaf] = f"{attention}.{theirs}"
        for i in levels:
            for j in range(depth):
                block(f"{side}.levels.{i}.{j}", f"{side}.{kind}_blocks.{i}.resnets.{j}")
            table[f"{side}.{resamplers}.{i}"] = f"{side}.{kind}_blocks.{i}.{kind}samplers.0.conv.conv"
    return table


def _pointwise(weight: np.ndarray) -> np.ndarray:
    """A dense layer [o i] as a 1x1x1 convolution [1 1 1 i o]."""
    return weight.T[None, None, None]
