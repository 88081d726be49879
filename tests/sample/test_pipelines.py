"""From noise to pixels: diffusers' HunyuanVideo pipelines against a converted folder, the same noise and prompt."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from PIL import Image
from tiny_hub import write_hub
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mi_jax.avatar.families import convert
from mi_jax.models.prompts import Prompter
from mi_jax.sample.avatar import load

HEIGHT, WIDTH, LATENT_FRAMES, STEPS = 32, 48, 3, 10
PROMPT = "She is happy."


def pipeline(hub, kind: str | None):
    parts = {
        "transformer": HunyuanVideoTransformer3DModel.from_pretrained(hub / "transformer"),
        "vae": AutoencoderKLHunyuanVideo.from_pretrained(hub / "vae"),
        "text_encoder_2": transformers.CLIPTextModel.from_pretrained(hub / "text_encoder_2"),
        "tokenizer": transformers.AutoTokenizer.from_pretrained(hub / "tokenizer"),
        "tokenizer_2": transformers.AutoTokenizer.from_pretrained(hub / "tokenizer_2"),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
    }
    if kind is None:
        made = HunyuanVideoPipeline(text_encoder=transformers.LlamaModel.from_pretrained(hub / "text_encoder"), **parts)
    else:
        made = HunyuanVideoImageToVideoPipeline(
            text_encoder=transformers.LlavaForConditionalGeneration.from_pretrained(hub / "text_encoder"),
            image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
            **parts,
        )
    made.set_progress_bar_config(disable=True)
    return made


def with_crop(avatar, kind: str | None):
    """The avatar and the pipeline's `prompt_template`: HunyuanVideo's words, counted in the toy tokenizer's tokens."""
    prompter = avatar.encoders.prompter
    name = "text" if kind is None else "image"
    template = getattr(prompter.config, name)
    before = prompter.tokenizer(template.text.split("{}")[0])["input_ids"]
    template = dataclasses.replace(template, crop_start=len(before))
    config = dataclasses.replace(prompter.config, **{name: template})
    prompter = Prompter(config, prompter.tokenizer, prompter.clip_tokenizer)
    told = {"template": template.text, "crop_start": template.crop_start}
    if kind is not None:
        start = before.index(config.image_token_id)
        patches = config.image_tokens
        told |= {"image_emb_len": patches, "image_emb_start": start, "image_emb_end": start + patches}
    return dataclasses.replace(avatar, encoders=dataclasses.replace(avatar.encoders, prompter=prompter)), told


@pytest.mark.parametrize("kind", [None, "token_replace", "latent_concat"])
def test_the_same_noise_becomes_the_same_video(tmp_path, kind):
    hub = write_hub(tmp_path / "hub", kind)
    family = "hunyuan-video" if kind is None else "hunyuan-video-i2v"
    assert convert(family, hub, tmp_path / "out").missing == []
    avatar = load(tmp_path / "out", devices=1)
    avatar = dataclasses.replace(avatar, config=avatar.config.replace(height=HEIGHT, width=WIDTH))
    avatar, template = with_crop(avatar, kind)
    assert (avatar.config.shift, avatar.config.embedded_guidance) == (7.0, 6.0)

    rng = np.random.default_rng(0)
    noise = rng.normal(size=(1, LATENT_FRAMES, HEIGHT // 8, WIDTH // 8, 4)).astype(np.float32)
    portrait = None
    told = {
        "prompt": PROMPT, "prompt_template": template, "height": HEIGHT, "width": WIDTH, "guidance_scale": 6.0,
        "num_frames": 4 * LATENT_FRAMES - 3, "num_inference_steps": STEPS,
    }  # fmt: skip
    if kind is not None:
        portrait = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        told["image"] = Image.fromarray(portrait)
    reference = pipeline(hub, kind)
    start = torch.from_numpy(noise.transpose(0, 4, 1, 2, 3).copy())
    expected = reference(**told, latents=start, output_type="latent").frames[0].numpy().transpose(1, 2, 3, 0)
    frames = np.asarray(reference(**told, latents=start, output_type="np").frames[0])

    conditions = avatar.conditions(portrait, [], [], PROMPT, LATENT_FRAMES)
    latents = avatar.denoise(
        conditions, seed=0, steps=STEPS, window=33, overlap=8, weights={}, latent_frames=LATENT_FRAMES, noise=noise
    )
    skipped = LATENT_FRAMES - len(expected)
    assert skipped == (kind == "latent_concat")
    error = np.linalg.norm(latents[skipped:] - expected) / np.linalg.norm(expected)
    assert error < 1e-4, error
    pixels = avatar.decode(latents)[avatar.config.lead_in :]
    assert pixels.shape == frames.shape
    near = np.abs(pixels.astype(np.float32) - 255 * frames) <= 1.0
    assert near.mean() > 0.999
    assert pixels.std() > 3  # not one colour
