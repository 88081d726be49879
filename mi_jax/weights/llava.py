"""LLaVA with Llama 3 (xtuner/llava-llama-3-8b-v1_1-transformers), or its Llama alone, as transformers stores them.

Its names have moved: `language_model.model.layers` (2024), `model.language_model.layers` (since 4.52), and, without
the language head, `language_model.layers`; the vision tower's lost their `vision_model`. HunyuanVideo's text-to-video
model uses the Llama alone: `model.layers`, or `layers` in diffusers' folders.
"""

import dataclasses
import pathlib

from flax import nnx

from mi_jax.errors import InputError
from mi_jax.models.clip import CLIPVisionConfig
from mi_jax.models.llama import Llama, LlamaConfig
from mi_jax.models.mllm import MLLM, MLLMConfig
from mi_jax.models.prompts import PromptConfig
from mi_jax.weights.clip import (
    POSITION_IDS,
    find_prefix,
    layer_table,
    read_config,
    vision_config,
    vision_table,
)
from mi_jax.weights.configs import understood
from mi_jax.weights.rows import Part, Table, Tensor, leaf_shapes, plan
from mi_jax.weights.sources import open_checkpoint

_LAYER = {
    "attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_LANGUAGE = ("language_model.model.", "model.language_model.", "language_model.", "model.", "")
_VISION = (
    "vision_tower.vision_model.",
    "model.vision_tower.vision_model.",
    "model.vision_tower.",
    "vision_tower.",
)
_PROJECTOR = ("multi_modal_projector.", "model.multi_modal_projector.")
_UNUSED = (r"(.*\.)?lm_head\.weight", r".*rotary_emb\.inv_freq", POSITION_IDS)
"""We only read Llama's hidden states: the head that predicts words has no place."""


def llava_table(language: str = "language_model.", vision: str = "vision_tower.", projector: str = "") -> Table:
    """`MLLM` without CLIP's text tower -> `LlavaModel`."""
    projector = projector or "multi_modal_projector."
    return {
        **{f"language.{ours}": theirs for ours, theirs in llama_table(language).items()},
        **{f"vision.{ours}": theirs for ours, theirs in vision_table(vision).items()},
        "projector_in": f"{projector}linear_1",
        "projector_out": f"{projector}linear_2",
    }


def llama_table(prefix: str = "") -> Table:
    """`Llama` -> `LlamaModel`."""
    return {
        "tokens": Tensor((f"{prefix}embed_tokens.weight",)),
        "final_norm": f"{prefix}norm",
        **layer_table("layers", f"{prefix}layers", _LAYER),
    }


def llava(path: pathlib.Path) -> tuple[CLIPVisionConfig | None, LlamaConfig, int | None, Part]:
    """(vision config, language config, image token id, where the leaves come from) of a folder of transformers.

    Of a Llama alone the first and the third are None.

    Raises:
      InputError: the folder holds neither a LLaVA with CLIP nor a Llama, or one with options that ours lack.
    """
    checkpoint = open_checkpoint(path)
    theirs = read_config(checkpoint, "llava", "llama")
    where = checkpoint.path.parent / "config.json"
    text = getattr(theirs, "text_config", theirs)
    if text.model_type != "llama":
        raise InputError(f"{where}: a LLaVA with {text.model_type} instead of llama is not read")
    rope = text.rope_parameters or {}
    plain = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
    odd = [f"{name} {getattr(text, name)!r}" for name, usual in plain.items() if getattr(text, name, usual) != usual]
    if rope.get("rope_type", "default") != "default":
        odd.append(f"rope_type {rope['rope_type']!r}")
    if odd:
        raise InputError(f"{where}: a Llama with {', '.join(odd)} is not read")
    with understood(where):
        language = LlamaConfig(
            vocab_size=text.vocab_size,
            width=text.hidden_size,
            mlp_width=text.intermediate_size,
            depth=text.num_hidden_layers,
            heads=text.num_attention_heads,
            key_value_heads=text.num_key_value_heads,
            rope_theta=float(rope["rope_theta"]),
            norm_eps=text.rms_norm_eps,
        )
    # The embedding of the longer names first: "model.embed_tokens" ends "language_model.model.embed_tokens" too.
    prefix = find_prefix(checkpoint, "embed_tokens.weight", _LANGUAGE)
    if theirs.model_type == "llama":
        shapes = leaf_shapes(lambda: Llama(language, rngs=nnx.Rngs(0)))
        part = Part("language", checkpoint, shapes, plan(shapes, llama_table(prefix)), _UNUSED)
        return None, language, None, part

    layer, strategy = theirs.vision_feature_layer, theirs.vision_feature_select_strategy
    if theirs.vision_config.model_type != "clip_vision_model" or strategy != "default" or not isinstance(layer, int):
        raise InputError(f"{where}: a LLaVA that reads anything but the patches of one layer of CLIP is not read")
    vision = vision_config(checkpoint, theirs.vision_config, layer)
    if not isinstance(theirs.image_token_id, int):
        raise InputError(f"{where}: image_token_id is {theirs.image_token_id!r}")
    table = llava_table(
        prefix,
        find_prefix(checkpoint, "embeddings.class_embedding", _VISION),
        find_prefix(checkpoint, "linear_1.weight", _PROJECTOR),
    )
    config = _bare(vision, language)
    shapes = leaf_shapes(lambda: MLLM(config, rngs=nnx.Rngs(0)))
    return vision, language, theirs.image_token_id, Part("llava", checkpoint, shapes, plan(shapes, table), _UNUSED)


def _bare(vision: CLIPVisionConfig, language: LlamaConfig) -> MLLMConfig:
    """An MLLM of these sizes without CLIP's text tower; its prompts have no leaves."""
    prompts = dataclasses.replace(PromptConfig.hunyuan_video(), image_tokens=vision.num_patches, image_token_id=0)
    return MLLMConfig(vision=vision, language=language, clip_text=None, prompts=prompts)
