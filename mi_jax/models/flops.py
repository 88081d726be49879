"""Floating-point operations of the denoiser, by formula: of products of matrices alone, a multiply and an add each."""

import dataclasses

from mi_jax.models.dit_config import DiTConfig


@dataclasses.dataclass(frozen=True)
class Flops:
    """One forward pass. linear: products with weights. attention: queries with keys, and weights with values."""

    linear: float
    attention: float

    @property
    def forward(self) -> float:
        return self.linear + self.attention

    @property
    def training(self) -> float:
        """Forward and backward: three times the forward, whatever is recomputed. What MFU counts (PaLM, 2204.02311)."""
        return 3 * self.forward

    def executed_in_training(self, *, remat: bool, attention_backward: float = 2.5) -> float:
        """What a device computes in a training step. With `remat` each body's forward pass runs twice.

        attention_backward: cost of the kernel's backward pass in forward passes: 5 products for 2 in flash attention
        (2307.08691), 7 where dq and dk, dv have kernels of their own (splash: 3.5).
        """
        forwards = 2 if remat else 1
        return (forwards + 2) * self.linear + (forwards + attention_backward) * self.attention

    def __mul__(self, times: int) -> "Flops":
        return Flops(times * self.linear, times * self.attention)


def dit_flops(
    config: DiTConfig,
    frames: int,
    height: int,
    width: int,
    text_tokens: int,
    *,
    speakers: int = 1,
    encode: bool = False,
) -> Flops:
    """Of one example of `frames` x `height` x `width` latents.

    text_tokens: text and image tokens together, padding included (it is computed, too).
    speakers: whose audio tokens are there, where the model has audio.
    encode: with the audio encoder, which training runs in every step and sampling once for a video.
    """
    d, bodies, r = config.width, config.single_depth // 2, config.mlp_ratio
    n = frames * height * width // (config.patch[1] * config.patch[2])
    m = text_tokens
    patch = config.patch[1] * config.patch[2]

    block = (4 + 2 * r) * d * d  # weights that a token meets: qkv, out, MLP
    blocks = (n + m) * block * (config.double_depth + config.single_depth)
    times = 1 + config.token_replace  # that the video's tokens are modulated for: a given latent frame's is 0
    modulation = ((1 + times) * 6 * config.double_depth + times * 3 * config.single_depth + 2) * d * d
    ends = n * patch * d * (config.in_channels + config.latent_channels)
    embedders = times + (config.pooled_dim is not None) + config.guidance_embedding
    inputs = (times + config.guidance_embedding) * 256 + (config.pooled_dim or 0)
    vectors = modulation + embedders * d * d + inputs * d
    refiner = m * (config.text_dim * d + config.refiner_depth * block)
    refiner += 2 * d * d + (256 + config.text_dim) * d + 2 * d * d * config.refiner_depth
    linear = blocks + ends + vectors + refiner
    attention = 2 * d * ((n + m) ** 2 * (config.double_depth + config.single_depth) + m * m * config.refiner_depth)

    if config.audio:
        a = config.audio
        heard = speakers * frames * a.tokens
        places = config.double_depth + bodies
        linear += places * (2 * n * d * d + 2 * heard * a.width * d + n * speakers * d)  # last: the masks' sum
        attention += 2 * d * places * n * speakers * a.tokens  # each token hears its own frame
        if encode:
            seen = 4 * 10 * a.layers  # tokens of a latent frame, of which `a.tokens` queries are asked
            per_frame = a.depth * (2 * seen * a.input_dim * a.width + 2 * a.tokens * a.input_dim * a.width)
            per_frame += a.depth * 2 * a.tokens * a.input_dim * a.mlp_ratio * a.width
            per_frame += a.tokens * a.input_dim * a.width * (a.width != a.input_dim)
            linear += speakers * frames * per_frame
            attention += speakers * frames * a.depth * 2 * a.tokens * seen * a.width
    return Flops(2.0 * linear, 2.0 * attention)
