"""From pictures, voices and sentences to what the denoiser is trained on and told: the one place where
encoders are run.

Preparing records and animating a portrait go through the same functions, so that training and sampling see the same
features.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from jaxtyping import Array, Bool, Float, UInt8
from PIL import Image

from mi_jax.models.hidden_states import hidden_states
from mi_jax.models.mllm import MLLM
from mi_jax.models.prompts import Prompter
from mi_jax.models.tiling import encode_latents
from mi_jax.models.vae import VAE
from mi_jax.models.wav2vec2 import Wav2Vec2


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The frozen models around the denoiser."""

    vae: VAE
    wav2vec2: Wav2Vec2 | None
    mllm: MLLM
    prompter: Prompter


def to_signed(frames: UInt8[np.ndarray, "*b H W 3"]) -> Float[np.ndarray, "*b H W 3"]:
    """Pixels 0..255 to [-1, 1], f32."""
    return frames.astype(np.float32) / 127.5 - 1.0


def to_pixels(video: Float[np.ndarray | Array, "*b H W 3"]) -> UInt8[np.ndarray, "*b H W 3"]:
    """[-1, 1] (or beyond: clipped) to pixels 0..255, rounded."""
    return np.clip(np.round((np.asarray(video, np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def portrait_latents(vae: VAE, portrait: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "h w c"]:
    """Scaled latents of one picture: latent frame 0 of a video that it starts."""
    return encode_latents(vae, jnp.asarray(to_signed(portrait))[None, None])[0, 0]


@jax.jit
def _encode_prompts(mllm: MLLM, images: Array | None, *arrays: Array):
    return mllm.encode(images, *arrays)


def prompt_features(
    encoders: Encoders, portrait: UInt8[np.ndarray, "H W 3"] | None, prompt: str
) -> tuple[dict[str, np.ndarray], int]:
    """What the MLLM makes of a portrait and a prompt, without batch axis, and how many prompt tokens did not fit.

    Keys: text_tokens [n d], text_mask [n], image_tokens [m d] where a portrait is given and, where the model has one,
    text_pooled [p].
    """
    image = None
    if portrait is not None:
        image = _centre_square(portrait, encoders.mllm.config.image_size)
        image = jnp.asarray(image.astype(np.float32) / 255.0)[None]
    prompts = encoders.prompter.tokenize([prompt], image=portrait is not None)
    arrays = [None if a is None else jnp.asarray(a) for a in prompts.arrays]
    outputs = _encode_prompts(encoders.mllm, image, *arrays)
    names = ("image_tokens", "text_tokens", "text_mask", "text_pooled")
    features = {name: np.asarray(value[0]) for name, value in zip(names, outputs) if value is not None}
    return features, int(prompts.dropped[0])


def _centre_square(portrait: UInt8[np.ndarray, "H W 3"], size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """What CLIP's image processor makes of a picture: the shorter side is `size`, of the longer the middle is kept."""
    height, width, _ = portrait.shape
    short = min(height, width)
    height, width = size * height // short, size * width // short
    image = Image.fromarray(portrait).resize((width, height), Image.Resampling.BICUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    return np.asarray(image)[top : top + size, left : left + size]


def latent_mask(mask: Bool[np.ndarray, "H W"] | Float[np.ndarray, "H W"], stride: int) -> Float[np.ndarray, "h w"]:
    """A picture mask on the latent grid, max-pooled so that small faces survive."""
    return reduce(mask.astype(np.float32), "(h p) (w q) -> h w", "max", p=stride, q=stride)


def latent_masks(
    masks: Bool[np.ndarray, "f H W"] | Float[np.ndarray, "f H W"], spatial_stride: int, temporal_stride: int
) -> Float[np.ndarray, "t h w"]:
    """The masks of a video's frames, f = (t - 1) temporal_stride + 1, one for each latent frame, max-pooled: the first
    is that of frame 0, each other the union over the `temporal_stride` frames that it stands for."""
    small = np.stack([latent_mask(mask, spatial_stride) for mask in masks])
    return np.concatenate([small[:1], reduce(small[1:], "(t g) h w -> t h w", "max", g=temporal_stride)])


def clip_record(
    encoders: Encoders,
    video: UInt8[np.ndarray, "f H W 3"],
    audio: Float[np.ndarray, "s n"],
    prompt: str,
    mask: Bool[np.ndarray, "s H W"] | Bool[np.ndarray, "s f H W"],
) -> dict[str, np.ndarray]:
    """The training record of one clip whose first frame is the portrait; f = 4k + 1 frames at 25 fps, audio at 16 kHz.
    mask: each speaker's face, over the whole clip or in each of its frames.

    H and W are sides that the VAE and the denoiser's patches divide (`AvatarConfig.padded_size`).
    Keys: latents f16 [t h w c] and portrait f16 [h w c] (scaled), face_mask f32 [s h w] (`latent_mask`; masks of
    frames: [s t h w], `latent_masks`) and audio_hidden f16 [s 2f L D] (wav2vec2 states) of each of the s speakers, and
    those of `prompt_features` in f16.
    """
    features, _ = prompt_features(encoders, video[0], prompt)
    record = {
        "latents": encode_latents(encoders.vae, jnp.asarray(to_signed(video))[None])[0],
        "portrait": portrait_latents(encoders.vae, video[0]),
        "audio_hidden": np.stack([hidden_states(encoders.wav2vec2, voice, len(video)) for voice in audio]),
        **features,
    }
    halves = {name: np.asarray(leaf).astype(np.float16) for name, leaf in record.items() if name != "text_mask"}
    vae = encoders.vae.config
    if mask.ndim == 4:
        masks = np.stack([latent_masks(face, vae.spatial_stride, vae.temporal_stride) for face in mask])
    else:
        masks = np.stack([latent_mask(face, vae.spatial_stride) for face in mask])
    return {**halves, "text_mask": record["text_mask"], "face_mask": masks}
