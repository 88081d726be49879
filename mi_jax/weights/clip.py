"""CLIP's towers as transformers stores them: alone, both together, or inside LLaVA."""

import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from flax import nnx

from mi_jax.errors import InputError
from mi_jax.files import reason
from mi_jax.models.clip import CLIPText, CLIPTextConfig, CLIPVisionConfig
from mi_jax.untrusted import check_folder, read_json
from mi_jax.weights.configs import understood
from mi_jax.weights.rows import Outputs, Part, Table, Tensor, leaf_shapes, plan
from mi_jax.weights.sources import Checkpoint, open_checkpoint

_LAYER = {
    "attention_norm": "layer_norm1",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
POSITION_IDS = r".*embeddings\.position_ids"
"""A counter 0, 1, 2, ... that older versions of transformers saved."""


def text_tower(path: pathlib.Path) -> tuple[CLIPTextConfig, Part]:
    """CLIP's text tower from a folder of transformers; of a whole CLIP, the vision tower and projections are unused.

    Raises:
      InputError: the folder holds no CLIP text tower.
    """
    checkpoint = open_checkpoint(path)
    theirs = read_config(checkpoint, "clip", "clip_text_model")
    config = text_config(checkpoint, getattr(theirs, "text_config", theirs))
    prefix = find_prefix(checkpoint, "embeddings.token_embedding.weight", ("text_model.", ""))
    shapes = leaf_shapes(lambda: CLIPText(config, rngs=nnx.Rngs(0)))
    unused = (POSITION_IDS, r"vision_model\..*", r"(text|visual)_projection\.weight", "logit_scale")
    rows = plan(shapes, text_table(prefix))
    return config, Part("clip_text", checkpoint, shapes, rows, unused)


def text_table(prefix: str = "") -> Table:
    """`CLIPText` -> `CLIPTextModel`."""
    return {
        "tokens": Tensor((f"{prefix}embeddings.token_embedding.weight",)),
        "positions": Tensor((f"{prefix}embeddings.position_embedding.weight",)),
        "final_norm": f"{prefix}final_layer_norm",
        **layer_table("layers", f"{prefix}encoder.layers", _LAYER),
    }


def vision_table(prefix: str = "") -> Table:
    """`CLIPVision` -> `CLIPVisionModel`."""
    return {
        "class_token": Tensor((f"{prefix}embeddings.class_embedding",)),
        "patch.kernel": Tensor((f"{prefix}embeddings.patch_embedding.weight",), _pixels_first),
        "positions": Tensor((f"{prefix}embeddings.position_embedding.weight",)),
        "pre_norm": f"{prefix}pre_layrnorm",
        "post_norm": f"{prefix}post_layernorm",
        **layer_table("layers", f"{prefix}encoder.layers", _LAYER),
    }


def layer_table(ours: str, theirs: str, names: dict[str, str]) -> dict[str, str | Outputs | Tensor]:
    """A stack of layers, from the names within one."""
    return {f"{ours}.{module}": f"{theirs}.{{i}}.{name}" for module, name in names.items()}


def text_config(checkpoint: Checkpoint, theirs: Any) -> CLIPTextConfig:
    """Ours, of a text config of transformers."""
    _check_activation(checkpoint, theirs)
    with understood(checkpoint.path.parent / "config.json"):
        # Id 2 is a mistake in the configs of 2021; the tokenizer's end of text is the last id.
        end = theirs.vocab_size - 1 if theirs.eos_token_id == 2 else theirs.eos_token_id
        return CLIPTextConfig(
            vocab_size=theirs.vocab_size,
            eos_token_id=end,
            width=theirs.hidden_size,
            mlp_width=theirs.intermediate_size,
            depth=theirs.num_hidden_layers,
            heads=theirs.num_attention_heads,
            max_tokens=theirs.max_position_embeddings,
            norm_eps=theirs.layer_norm_eps,
        )


def vision_config(checkpoint: Checkpoint, theirs: Any, feature_layer: int) -> CLIPVisionConfig:
    """Ours, of a vision config of transformers."""
    _check_activation(checkpoint, theirs)
    with understood(checkpoint.path.parent / "config.json"):
        return CLIPVisionConfig(
            image_size=theirs.image_size,
            patch_size=theirs.patch_size,
            width=theirs.hidden_size,
            mlp_width=theirs.intermediate_size,
            depth=theirs.num_hidden_layers,
            heads=theirs.num_attention_heads,
            feature_layer=feature_layer,
            norm_eps=theirs.layer_norm_eps,
        )


def read_config(checkpoint: Checkpoint, *kinds: str) -> Any:
    """The config of transformers beside a checkpoint, with its defaults filled in.

    Raises:
      InputError: it is missing, not readable, or of no model of `kinds`.
    """
    from transformers import AutoConfig

    path = checkpoint.path.parent / "config.json"
    stored = read_json(path)
    check_folder(path.parent)
    if stored.get("model_type") not in kinds:  # before transformers chooses a class by it
        raise InputError(f"{path}: of a {str(stored.get('model_type'))[:40]}, not of a {' or '.join(kinds)}")
    try:
        return AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{path}: not a config of transformers ({reason(error)})") from None


def find_prefix(checkpoint: Checkpoint, name: str, prefixes: Iterable[str]) -> str:
    """The first of `prefixes` with which `name` is in the checkpoint.

    Raises:
      InputError: with none it is.
    """
    prefixes = list(prefixes)
    for prefix in prefixes:
        if prefix + name in checkpoint.tensors:
            return prefix
    raise InputError(f"{checkpoint.path}: holds no {' or '.join(prefix + name for prefix in prefixes)}")


def _check_activation(checkpoint: Checkpoint, theirs: Any) -> None:
    if theirs.hidden_act != "quick_gelu":
        raise InputError(f"{checkpoint.path}: a CLIP with {theirs.hidden_act} instead of quick_gelu is not read")


def _pixels_first(weight: np.ndarray) -> np.ndarray:
    """A patch convolution [d c p q] as a kernel of patches [(p q c) d]."""
    return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])
