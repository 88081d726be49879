"""Records of random numbers, and a denoiser of their sizes."""

import numpy as np

from mi_jax.models.audio_encoder import AudioEncoderConfig
from mi_jax.models.dit import DiTConfig

AUDIO = AudioEncoderConfig(input_dim=8, layers=2, width=16, heads=2, depth=1)
TINY = DiTConfig(
    image_to_video=True, width=32, heads=2, double_depth=2, single_depth=4, text_dim=12, pooled_dim=6,
    rope_axes=(4, 6, 6), latent_channels=4, audio=AUDIO,
)  # fmt: skip


def record(rng: np.random.Generator, t: int = 9, speakers: int = 1, moving: bool = False) -> dict[str, np.ndarray]:
    """moving: masks of every latent frame, in which each marked place goes to the next."""
    marked = lambda k, frame: (np.arange(16).reshape(4, 4) + frame) % 3 == k  # noqa: E731
    frames = range(t) if moving else [0]
    masks = np.stack([np.stack([marked(k, frame) for frame in frames]) for k in range(speakers)]).astype(np.float32)
    half = lambda *shape: rng.normal(size=shape).astype(np.float16)  # noqa: E731
    return {
        "latents": half(t, 4, 4, 4),
        "portrait": half(4, 4, 4),
        "face_mask": masks if moving else masks[:, 0],
        "audio_hidden": half(speakers, 2 * (4 * (t - 1) + 1), 2, 8),
        "image_tokens": half(2, 12),
        "text_tokens": half(5, 12),
        "text_mask": np.arange(5) < 3,
        "text_pooled": half(6),
    }
