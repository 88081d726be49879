"""Records of random numbers, and a denoiser of their sizes."""

import numpy as np

from mi_jax.models.audio_encoder import AudioEncoderConfig
from mi_jax.models.dit import DiTConfig

AUDIO = AudioEncoderConfig(input_dim=8, layers=2, width=16, heads=2, depth=1)
TINY = DiTConfig(
    image_to_video=True, width=32, heads=2, double_depth=2, single_depth=4, text_dim=12, pooled_dim=6,
    rope_axes=(4, 6, 6), latent_channels=4, audio=AUDIO,
)  # fmt: skip


def record(rng: np.random.Generator, t: int = 9, speakers: int = 1) -> dict[str, np.ndarray]:
    half = lambda *shape: rng.normal(size=shape).astype(np.float16)  # noqa: E731
    return {
        "latents": half(t, 4, 4, 4),
        "portrait": half(4, 4, 4),
        "face_mask": np.stack([np.arange(16).reshape(4, 4) % 3 == k for k in range(speakers)]).astype(np.float32),
        "audio_hidden": half(speakers, 2 * (4 * (t - 1) + 1), 2, 8),
        "image_tokens": half(2, 12),
        "text_tokens": half(5, 12),
        "text_mask": np.arange(5) < 3,
        "text_pooled": half(6),
    }
