"""Floating-point operations of the models, by formula: what the mathematics asks for, whatever a program does.

Counted are products of matrices, convolutions and attention, two operations for each multiplication and addition;
norms, activations and positions are not (about 1 % at the model's own widths). Padding counts like any other token, and
attention counts all pairs, those under the VAE's causal mask too. Recomputation (remat) does not count: this is the
numerator of model FLOPs utilisation (MFU; PaLM, 2204.02311, appendix B).
"""

from math import prod

from mi_jax.models.dit import TIMESTEP_DIM
from mi_jax.models.dit_config import DiTConfig
from mi_jax.models.vae import VAEConfig, kernel_between

BACKWARD = 2
"""Operations of the backward pass over those of the forward: one product each for the inputs and the parameters."""


def dit_tokens(config: DiTConfig, latents: tuple[int, int, int]) -> int:
    """Video tokens of (t, h, w) latents."""
    return prod(size // patch for size, patch in zip(latents, config.patch, strict=True))


def dit_flops(
    config: DiTConfig, latents: tuple[int, int, int], *, text_tokens: int, batch: int = 1, speakers: int = 1
) -> int:
    """Operations of one velocity of `batch` examples.

    latents: (t, h, w) of an example. text_tokens: image and text tokens of the MLLM together, padding included.
    speakers: those whose audio is given; 0 leaves the audio attention out, as stage 1 has it.
    """
    d, ratio, n, m = config.width, config.mlp_ratio, dit_tokens(config, latents), text_tokens
    pixels = prod(config.patch)
    replaced = 1 + config.token_replace  # modulations of the video's tokens: also those of latent frame 0
    embed = lambda d_in: d_in * d + d * d  # noqa: E731

    total = n * config.in_channels * pixels * d + replaced * embed(TIMESTEP_DIM)
    total += embed(config.pooled_dim) if config.pooled_dim else 0
    total += embed(TIMESTEP_DIM) if config.guidance_embedding else 0
    refiner = m * (4 + 2 * ratio) * d * d + 2 * d * d + _attention(m, m, d)
    total += m * config.text_dim * d + embed(TIMESTEP_DIM) + embed(config.text_dim) + config.refiner_depth * refiner
    block = (n + m) * (4 + 2 * ratio) * d * d + _attention(n + m, n + m, d)
    total += config.double_depth * (block + (1 + replaced) * 6 * d * d)
    total += config.single_depth * (block + replaced * 3 * d * d)
    total += 2 * d * d + n * d * config.latent_channels * pixels
    if config.audio is not None and speakers:
        tokens, frame = config.audio.tokens, speakers * latents[0] * config.audio.tokens
        # The last term weighs and sums the speakers.
        heard = 2 * n * d * d + frame * config.audio.width * 2 * d + speakers * _attention(n, tokens, d)
        total += (config.double_depth + config.single_depth // 2) * (heard + speakers * n * d)
    return 2 * batch * total


def _attention(queries: int, keys: int, width: int) -> int:
    """Multiplications of the scores and of the weighted sum, all heads."""
    return 2 * queries * keys * width


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
    return 4 * _convolution(grid, (time_kernel, 3, 3), c, c) + 4 * tokens * c * c + _attention(tokens, tokens, c)
