"""Folders as HunyuanVideo's and HunyuanVideo-I2V's on the hub, in diffusers' layout, a few channels wide."""

import pathlib

import torch
import transformers
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel

from mi_jax.models.prompts import IMAGE_TOKEN, PUPPET_TOKENS
from mi_jax.puppets.words import build_puppet_tokenizer

SENTENCES = ["She is happy and nods."]
IMAGE_ID = PUPPET_TOKENS.index(IMAGE_TOKEN)
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def noise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.1 * drawn + float("norm" in name and name.endswith("weight")))
    return module.eval()


def write_hub(root: pathlib.Path, image_condition: str | None) -> pathlib.Path:
    """`image_condition`: "token_replace", "latent_concat" (no embedded guidance), or None for text to video."""
    concat = image_condition == "latent_concat"
    noise(
        HunyuanVideoTransformer3DModel(
            in_channels=9 if concat else 4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=2,
            num_refiner_layers=1,
            guidance_embeds=not concat,
            text_embed_dim=16,
            pooled_projection_dim=12,
            rope_axes_dim=(4, 6, 6),
            image_condition_type=image_condition,
        ),
        1,
    ).save_pretrained(root / "transformer")
    noise(
        AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2
        ),
        2,
    ).save_pretrained(root / "vae")
    sizes = {"intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    llava = noise(
        transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config=transformers.CLIPVisionConfig(hidden_size=8, image_size=28, patch_size=14, **sizes),
                text_config=transformers.LlamaConfig(
                    hidden_size=16, num_key_value_heads=1, vocab_size=256, rms_norm_eps=1e-5, **sizes
                ),
                image_token_id=IMAGE_ID,
                pad_token_id=0,
            )
        ),
        3,
    )
    (llava if image_condition else llava.model.language_model).save_pretrained(root / "text_encoder")
    ends = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    noise(
        transformers.CLIPTextModel(
            transformers.CLIPTextConfig(hidden_size=12, vocab_size=256, max_position_embeddings=77, **sizes, **ends)
        ),
        4,
    ).save_pretrained(root / "text_encoder_2")
    tokenizer = build_puppet_tokenizer(SENTENCES)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN, *HEADERS]})
    assert len(tokenizer) <= 256
    tokenizer.save_pretrained(root / "tokenizer")
    build_puppet_tokenizer(SENTENCES, closed=True).save_pretrained(root / "tokenizer_2")
    return root
