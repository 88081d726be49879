"""Floating-point operations of the models, by formula: what the mathematics asks for, whatever a program does.

Counted are products of matrices, convolutions and attention, two operations for each multiplication and addition;
norms, activations and positions are not (about 1 % at the model's own widths). Padding counts like any other token, and
attention counts all pairs, those under the VAE's causal mask too. Recomputation (remat) does not count: this is the
numerator of model FLOPs utilisation (MFU; PaLM, 2204.02311, appendix B).
"""

import dataclasses
from math import prod

from mi_jax.models.dit_config import DiTConfig
from mi_jax.models.vae import VAEConfig, kernel_between


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
    d, r = config.width, config.mlp_ratio
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
        places = sum(config.bodies(kind) for kind in config.audio_after)
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


def vae_encode_flops(config: VAEConfig, video: tuple[int, int, int], *, batch: int = 1) -> int:
    """Operations of encoding (frames, height, width) pixels as one tile; frames are 4k + 1, or as the strides say."""
    f, h, w = video[0], video[1] // config.patch_size, video[2] // config.patch_size
    widths, kernels = config.widths, config.time_kernels
    total = _convolution((f, h, w), (kernels[0], 3, 3), 3 * config.patch_size**2, widths[0])
    for i, (c, o, kernel) in enumerate(zip((widths[0], *widths), widths, kernels)):
        total += _level((f, h, w), c, o, config.encoder_blocks, kernel)
        if i < len(config.strides):
            st, sh, sw = config.strides[i]
            f, h, w = (f - 1) // st + 1, h // sh, w // sw
            total += _convolution((f, h, w), kernel_between(kernel, config.strides[i]), o, o)
    moments = 2 * config.latent_channels
    total += _mid((f, h, w), widths[-1], kernels[-1]) + _convolution((f, h, w), (3, 3, 3), widths[-1], moments)
    return 2 * batch * (total + _convolution((f, h, w), (1, 1, 1), moments, moments))


def vae_decode_flops(config: VAEConfig, latents: tuple[int, int, int], *, batch: int = 1) -> int:
    """Operations of decoding (t, h, w) latents as one tile."""
    t, h, w = latents
    c, widths, kernels = config.latent_channels, config.widths[::-1], config.time_kernels[::-1]
    total = _convolution((t, h, w), (1, 1, 1), c, c) + _convolution((t, h, w), (3, 3, 3), c, widths[0])
    total += _mid((t, h, w), widths[0], kernels[0])
    for i, (c, o, kernel) in enumerate(zip((widths[0], *widths), widths, kernels)):
        total += _level((t, h, w), c, o, config.decoder_blocks, kernel)
        if i < len(config.decoder_strides):
            st, sh, sw = config.decoder_strides[i]
            t, h, w = st * (t - 1) + 1, h * sh, w * sw
            # Each convolution between two levels is as long in time as the finer level's.
            total += _convolution((t, h, w), kernel_between(kernels[i + 1], config.decoder_strides[i]), o, o)
    return 2 * batch * (total + _convolution((t, h, w), (kernels[-1], 3, 3), widths[-1], 3 * config.patch_size**2))


def _convolution(out: tuple[int, int, int], kernel: tuple[int, int, int], c: int, o: int) -> int:
    kt, kh, kw = kernel
    # One frame alone is met by one time tap, the sum of all.
    return prod(out) * (kt if out[0] > 1 else 1) * kh * kw * c * o


def _level(grid: tuple[int, int, int], c: int, o: int, depth: int, time_kernel: int) -> int:
    kernel = (time_kernel, 3, 3)
    first = _convolution(grid, kernel, c, o) + (_convolution(grid, (1, 1, 1), c, o) if c != o else 0)
    return first + (2 * depth - 1) * _convolution(grid, kernel, o, o)


def _mid(grid: tuple[int, int, int], c: int, time_kernel: int) -> int:
    tokens = prod(grid)
    return 4 * _convolution(grid, (time_kernel, 3, 3), c, c) + 4 * tokens * c * c + 2 * tokens * tokens * c
