"""wav2vec 2.0 as transformers stores it: facebook/wav2vec2-base, -base-960h, TencentGameMate/chinese-wav2vec2-base."""

import pathlib

import numpy as np
from flax import nnx

from mi_jax.errors import InputError
from mi_jax.models.wav2vec2 import Wav2Vec2, Wav2Vec2Config
from mi_jax.weights.clip import find_prefix, layer_table, read_config
from mi_jax.weights.configs import understood
from mi_jax.weights.rows import Outputs, Part, Table, Tensor, leaf_shapes, plan
from mi_jax.weights.sources import open_checkpoint

_LAYER = {
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "out": "attention.out_proj",
    "attention_norm": "layer_norm",
    "mlp_in": "feed_forward.intermediate_dense",
    "mlp_out": "feed_forward.output_dense",
    "mlp_norm": "final_layer_norm",
}
_POSITION = "encoder.pos_conv_embed.conv."
_UNUSED = (
    r"(.*\.)?masked_spec_embed",  # stands in for masked steps in pretraining
    r"lm_head\..*",  # reads letters
    r"(project_hid|project_q|quantizer)\..*",  # pretraining's targets
)


def wav2vec2(path: pathlib.Path) -> tuple[Wav2Vec2Config, Part]:
    """The config of a wav2vec2 in a folder of transformers, and where its leaves come from.

    Raises:
      InputError: the folder holds none, or the large models' architecture.
    """
    checkpoint = open_checkpoint(path)
    theirs = read_config(checkpoint, "wav2vec2")
    where = checkpoint.path.parent / "config.json"
    with understood(where):
        if theirs.feat_extract_norm != "group" or theirs.do_stable_layer_norm or theirs.conv_bias or theirs.add_adapter:
            raise InputError("of wav2vec2's architectures only that of the base models is read")
        if len(set(theirs.conv_dim)) != 1 or {theirs.hidden_act, theirs.feat_extract_activation} != {"gelu"}:
            raise InputError("a wav2vec2 with several conv_dim or without gelu is not read")
        config = Wav2Vec2Config(
            conv_dim=theirs.conv_dim[0],
            conv_kernels=tuple(theirs.conv_kernel),
            conv_strides=tuple(theirs.conv_stride),
            width=theirs.hidden_size,
            num_layers=theirs.num_hidden_layers,
            num_heads=theirs.num_attention_heads,
            mlp_width=theirs.intermediate_size,
            position_kernel=theirs.num_conv_pos_embeddings,
            position_groups=theirs.num_conv_pos_embedding_groups,
            norm_epsilon=theirs.layer_norm_eps,
        )
    prefix = find_prefix(checkpoint, "feature_projection.projection.weight", ("wav2vec2.", ""))
    old = f"{prefix}{_POSITION}weight_g" in checkpoint.tensors
    shapes = leaf_shapes(lambda: Wav2Vec2(config, rngs=nnx.Rngs(0)))
    rows = plan(shapes, wav2vec2_table(config, prefix, old_weight_norm=old))
    return config, Part("wav2vec2", checkpoint, shapes, rows, _UNUSED)


def wav2vec2_table(config: Wav2Vec2Config, prefix: str = "", *, old_weight_norm: bool = False) -> Table:
    """`Wav2Vec2` -> `Wav2Vec2Model`, with PyTorch's spelling of weight norm before 2.0 or the present one."""
    position = prefix + _POSITION
    norm = (
        ("weight_g", "weight_v") if old_weight_norm else tuple(f"parametrizations.weight.original{i}" for i in (0, 1))
    )
    table: dict[str, str | Outputs | Tensor] = {
        f"convs.{i}": f"{prefix}feature_extractor.conv_layers.{i}.conv" for i in range(len(config.conv_kernels))
    }
    return {
        **table,
        "channel_norm": f"{prefix}feature_extractor.conv_layers.0.layer_norm",
        "projection_norm": f"{prefix}feature_projection.layer_norm",
        "projection": f"{prefix}feature_projection.projection",
        "position.kernel": Tensor(tuple(position + name for name in norm), _fold_weight_norm),
        "position.bias": Tensor((f"{position}bias",)),
        "encoder_norm": f"{prefix}encoder.layer_norm",
        **layer_table("layers", f"{prefix}encoder.layers", _LAYER),
    }


def _fold_weight_norm(gain: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """The kernel [k i o] of gains [1 1 k] and directions [o i k]; the norm is that of a tap's inputs and outputs."""
    gain, direction = (x.astype(np.float32) for x in (gain, direction))
    norm = np.sqrt(np.sum(np.square(direction), axis=(0, 1), keepdims=True))
    with np.errstate(invalid="ignore"):  # shapes are checked on zeros
        return (gain * direction / norm).transpose(2, 1, 0)
