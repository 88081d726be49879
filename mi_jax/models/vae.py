"""The causal 3D VAE of HunyuanVideo ("884-16c"): 4k + 1 frames of 8h x 8w pixels become k + 1 latent frames h x w x 16.

Source: HunyuanVideo (arXiv 2412.03603); the reference of the tests is `AutoencoderKLHunyuanVideo` of diffusers. Three
options that HunyuanVideo itself does not use come from later public video VAEs, for presets that are trained here:
pixels folded into channels before the first convolution (`patch_size`, as Wan 2.2 and LTX-Video), RMS norm over
channels instead of group norm (`norm`, as Wan and HunyuanVideo 1.5), and parameter-free shortcuts around every change
of resolution (`shortcuts`, as DC-AE and HunyuanVideo 1.5).

Causality: convolutions and attention never look ahead. Group norm does, because its statistics span the whole clip;
with `norm="rms"` the VAE is strictly causal, and latent 0 of a clip equals the latent of its first frame alone.
"""

from dataclasses import dataclass
from math import prod
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import nnx
from jaxtyping import Array, Float

from mi_jax.bounds import Channels, Depth, Epsilon, Positive, Taps, Within, check_fields
from mi_jax.errors import InputError
from mi_jax.models.attention import attention
from mi_jax.models.conv import CausalConv3d, Triple

_Stride = Annotated[int, Within(1, 16)]
_Strides = tuple[_Stride, _Stride, _Stride]


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Shape of the VAE. Defaults are HunyuanVideo's.

    widths, strides: channels of each encoder level, and the (time, height, width) stride between a level and the next
      (one fewer). decoder_strides: those of the decoder, coarse to fine; HunyuanVideo's are not the encoder's mirrored,
      the first is spatial in both.
    encoder_blocks, decoder_blocks: residual blocks per level. time_kernels: extent in time of a level's convolutions
      (of those between two levels: the finer one's, but always 3 where the stride crosses time).
    tile_size [pixels], tile_frames, tile_overlap: tiles of the tiled paths; the overlap is a fraction of a tile.
    """

    latent_channels: Channels = 16
    widths: tuple[Channels, ...] = (128, 256, 512, 512)
    strides: tuple[_Strides, ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
    decoder_strides: tuple[_Strides, ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
    encoder_blocks: Depth = 2
    decoder_blocks: Depth = 3
    time_kernels: tuple[Taps, ...] = (3, 3, 3, 3)
    patch_size: _Stride = 1
    norm: Literal["group", "rms"] = "group"
    norm_groups: Channels = 32
    norm_eps: Epsilon = 1e-6
    shortcuts: bool = False
    scaling_factor: Positive = 0.476986
    tile_size: Annotated[int, Within(1, 2**16)] = 256
    tile_frames: Annotated[int, Within(1, 2**16)] = 64
    tile_overlap: Annotated[float, Within(0, below=1)] = 0.25

    def __post_init__(self):
        check_fields(self)
        levels = len(self.widths)
        if not 1 <= levels <= 8:
            raise InputError(f"widths has {levels} entries, must have 1 to 8")
        for name, count in (("strides", levels - 1), ("decoder_strides", levels - 1), ("time_kernels", levels)):
            if len(getattr(self, name)) != count:
                raise InputError(f"{name} has {len(getattr(self, name))} entries, for {levels} widths")
        over, back = (tuple(map(prod, zip(*strides))) for strides in (self.strides, self.decoder_strides))
        if over != back or over[1:2] != over[2:]:
            raise InputError(f"strides {self.strides} and {self.decoder_strides}: not of the same size, or not square")
        if self.norm == "group" and any(width % self.norm_groups for width in self.widths):
            raise InputError(f"norm_groups {self.norm_groups} does not divide the widths {self.widths}")
        if self.shortcuts and not _divides(self.widths[-1], self.latent_channels):
            raise InputError(
                f"shortcuts from {self.widths[-1]} to {self.latent_channels} channels: neither divides the other"
            )

    @classmethod
    def hunyuan_video(cls) -> "VAEConfig":
        return cls()

    @classmethod
    def puppet(cls) -> "VAEConfig":
        """96x96 portraits: 12x12 latents."""
        return cls(
            widths=(96, 128, 128, 128),
            strides=((1, 2, 2), (2, 1, 1), (2, 1, 1)),
            decoder_strides=((2, 1, 1), (2, 1, 1), (1, 2, 2)),
            encoder_blocks=1,
            decoder_blocks=3,
            time_kernels=(1, 1, 1, 1),
            patch_size=4,
            norm="rms",
            shortcuts=True,
            tile_frames=16,
        )

    @property
    def spatial_stride(self) -> int:
        return self.patch_size * prod(s for _, s, _ in self.strides)

    @property
    def temporal_stride(self) -> int:
        return prod(s for s, _, _ in self.strides)


def _fold(x, strides: Triple):
    """[b t h w c] -> [b t' h' w' (c st sh sw)]; the first frame stands alone, filled up with copies of itself.

    Neighbouring channels are neighbouring pixels of one colour, so that `_match_channels` averages those."""
    st, sh, sw = strides
    x = jnp.pad(x, ((0, 0), (st - 1, 0), (0, 0), (0, 0), (0, 0)), mode="edge")
    return rearrange(x, "b (t st) (h sh) (w sw) c -> b t h w (c st sh sw)", st=st, sh=sh, sw=sw)


def _unfold(x, strides: Triple):
    """Inverse of `_fold`: the copies before the first frame are dropped."""
    st, sh, sw = strides
    x = rearrange(x, "b t h w (c st sh sw) -> b (t st) (h sh) (w sw) c", st=st, sh=sh, sw=sw)
    return x[:, st - 1 :]


def _match_channels(x, channels: int):
    """Averages groups of neighbouring channels, or repeats each channel, until there are `channels`."""
    if x.shape[-1] >= channels:
        return reduce(x, "b t h w (c g) -> b t h w c", "mean", c=channels)
    return repeat(x, "b t h w c -> b t h w (c g)", g=channels // x.shape[-1])


def _divides(c: int, o: int) -> bool:
    return c % o == 0 or o % c == 0


def upsample_nearest(x: Float[Array, "b t h w c"], strides: Triple) -> Float[Array, "b T H W c"]:
    """Repeats pixels and frames; the first frame is not repeated in time, so t frames become st * (t - 1) + 1."""
    st, sh, sw = strides
    x = repeat(x, "b t h w c -> b (t st) (h sh) (w sw) c", st=st, sh=sh, sw=sw)
    return x[:, st - 1 :]


class Norm(nnx.Module):
    """Group norm over a clip's pixels and frames, or RMS norm over the channels of each pixel; statistics in f32."""

    def __init__(self, c: int, config: VAEConfig):
        self.scale = nnx.Param(jnp.ones((c,)))
        self.bias = nnx.Param(jnp.zeros((c,))) if config.norm == "group" else None
        self.groups, self.eps = (config.norm_groups if config.norm == "group" else None), config.norm_eps

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        y = x.astype(jnp.float32)
        scale = self.scale[...].reshape(1, 1, 1, 1, -1)
        if self.groups is None:
            y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps) * scale
            return y.astype(x.dtype)
        y = rearrange(y, "b t h w (g c) -> b t h w g c", g=self.groups)
        y = y - jnp.mean(y, axis=(1, 2, 3, 5), keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=(1, 2, 3, 5), keepdims=True) + self.eps)
        y = rearrange(y, "b t h w g c -> b t h w (g c)")
        return (y * scale + self.bias[...].reshape(1, 1, 1, 1, -1)).astype(x.dtype)


class ResnetBlock(nnx.Module):
    def __init__(self, c: int, o: int, config: VAEConfig, *, time_kernel: int = 3, rngs: nnx.Rngs):
        kernel = (time_kernel, 3, 3)
        self.norm1, self.conv1 = Norm(c, config), CausalConv3d(c, o, kernel, rngs=rngs)
        # Zero: a new block is the identity.
        self.norm2, self.conv2 = Norm(o, config), CausalConv3d(o, o, kernel, zero=True, rngs=rngs)
        self.shortcut = CausalConv3d(c, o, (1, 1, 1), rngs=rngs) if c != o else None

    def __call__(self, x):
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = self.conv2(nnx.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class FrameCausalAttention(nnx.Module):
    """One head over all pixels of the present and the earlier frames."""

    def __init__(self, c: int, config: VAEConfig, *, rngs: nnx.Rngs):
        self.norm = Norm(c, config)
        self.query, self.key, self.value = (CausalConv3d(c, c, (1, 1, 1), rngs=rngs) for _ in range(3))
        self.out = CausalConv3d(c, c, (1, 1, 1), zero=True, rngs=rngs)

    def __call__(self, x):
        t, h, w = x.shape[1:4]
        y = self.norm(x)
        q = rearrange(self.query(y), "b t h w c -> t b (h w) 1 c")
        k, v = (rearrange(f(y), "b t h w c -> b (t h w) 1 c") for f in (self.key, self.value))

        @jax.checkpoint
        def one_frame(args):
            # One query frame at a time: the score matrix is [h w, t h w] instead of its square.
            q, f = args
            return attention(q, k, v, length=jnp.broadcast_to((f + 1) * (h * w), x.shape[:1]), implementation="xla")

        y = jax.lax.map(one_frame, (q, jnp.arange(t)))
        return x + self.out(rearrange(y, "t b (h w) 1 c -> b t h w c", h=h, w=w))


class MidBlock(nnx.Module):
    def __init__(self, c: int, config: VAEConfig, *, rngs: nnx.Rngs):
        time_kernel = config.time_kernels[-1]
        self.before = ResnetBlock(c, c, config, time_kernel=time_kernel, rngs=rngs)
        self.attention = FrameCausalAttention(c, config, rngs=rngs)
        self.after = ResnetBlock(c, c, config, time_kernel=time_kernel, rngs=rngs)

    def __call__(self, x):
        return self.after(self.attention(self.before(x)))


def kernel_between(time_kernel: int, strides: Triple) -> Triple:
    """Extent of the convolution between two levels, of which the finer has `time_kernel`."""
    return (3 if strides[0] > 1 else time_kernel, 3, 3)


def _level(c: int, o: int, depth: int, time_kernel: int, config: VAEConfig, rngs: nnx.Rngs):
    return nnx.List(
        [ResnetBlock(c if i == 0 else o, o, config, time_kernel=time_kernel, rngs=rngs) for i in range(depth)]
    )


class Encoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths, pixels = config.widths, 3 * config.patch_size**2
        self.shortcut_in = config.shortcuts and _divides(pixels, widths[0])
        self.conv_in = CausalConv3d(pixels, widths[0], (config.time_kernels[0], 3, 3), zero=self.shortcut_in, rngs=rngs)
        self.levels = nnx.List(
            [
                _level(c, o, config.encoder_blocks, kt, config, rngs)
                for c, o, kt in zip((widths[0], *widths[:-1]), widths, config.time_kernels, strict=True)
            ]
        )
        self.downs = nnx.List(
            [
                CausalConv3d(c, c, kernel_between(kt, s), s, zero=config.shortcuts, rngs=rngs)
                for c, kt, s in zip(widths[:-1], config.time_kernels[:-1], config.strides, strict=True)
            ]
        )
        self.mid = MidBlock(widths[-1], config, rngs=rngs)
        self.norm_out = Norm(widths[-1], config)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels, zero=config.shortcuts, rngs=rngs)

    def __call__(self, x):
        config = self.config
        x = _fold(x, (1, config.patch_size, config.patch_size))
        y = self.conv_in(x)
        x = y + _match_channels(x, y.shape[-1]) if self.shortcut_in else y
        for i, level in enumerate(self.levels):
            for block in level:
                x = block(x)
            if i < len(self.downs):
                y = self.downs[i](x)
                x = y + _match_channels(_fold(x, config.strides[i]), y.shape[-1]) if config.shortcuts else y
        x = self.mid(x)
        y = self.conv_out(nnx.silu(self.norm_out(x)))
        if config.shortcuts:
            # To the means alone: a log variance is no picture.
            y = y + jnp.pad(_match_channels(x, config.latent_channels), ((0, 0),) * 4 + ((0, config.latent_channels),))
        return y


class Decoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths, pixels = config.widths[::-1], 3 * config.patch_size**2
        self.conv_in = CausalConv3d(config.latent_channels, widths[0], zero=config.shortcuts, rngs=rngs)
        self.mid = MidBlock(widths[0], config, rngs=rngs)
        self.levels = nnx.List(
            [
                _level(c, o, config.decoder_blocks, kt, config, rngs)
                for c, o, kt in zip((widths[0], *widths[:-1]), widths, config.time_kernels[::-1], strict=True)
            ]
        )
        self.ups = nnx.List(
            [
                CausalConv3d(c, c, kernel_between(kt, s), zero=config.shortcuts, rngs=rngs)
                for c, kt, s in zip(widths[:-1], config.time_kernels[-2::-1], config.decoder_strides, strict=True)
            ]
        )
        self.norm_out = Norm(widths[-1], config)
        self.shortcut_out = config.shortcuts and _divides(widths[-1], pixels)
        self.conv_out = CausalConv3d(
            widths[-1], pixels, (config.time_kernels[0], 3, 3), zero=self.shortcut_out, rngs=rngs
        )

    def __call__(self, z):
        config = self.config
        x = self.conv_in(z)
        if config.shortcuts:
            x = x + _match_channels(z, x.shape[-1])
        x = self.mid(x)
        strides = config.decoder_strides
        for i, level in enumerate(self.levels):
            for block in level:
                x = block(x)
            if i < len(self.ups):
                y = self.ups[i](upsample_nearest(x, strides[i]))
                if config.shortcuts:
                    st, sh, sw = strides[i]
                    y = y + _unfold(_match_channels(x, x.shape[-1] * st * sh * sw), strides[i])
                x = y
        y = self.conv_out(nnx.silu(self.norm_out(x)))
        if self.shortcut_out:
            y = y + _match_channels(x, y.shape[-1])
        return _unfold(y, (1, config.patch_size, config.patch_size))


class VAE(nnx.Module):
    """Encoder, decoder and the two 1x1x1 convolutions between them. f32 parameters; computes in the input's dtype."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        c = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = CausalConv3d(2 * c, 2 * c, (1, 1, 1), rngs=rngs)
        self.post_quant_conv = CausalConv3d(c, c, (1, 1, 1), rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        # Both start as the identity, with little noise on the latents: training begins as an autoencoder.
        self.quant_conv.kernel[...] = jnp.eye(2 * c).reshape(1, 1, 1, 2 * c, 2 * c)
        self.quant_conv.bias[...] = jnp.concatenate([jnp.zeros(c), jnp.full(c, -6.0)])
        self.post_quant_conv.kernel[...] = jnp.eye(c).reshape(1, 1, 1, c, c)

    def encode(self, video: Float[Array, "b f H W 3"]) -> tuple[Float[Array, "b t h w c"], Float[Array, "b t h w c"]]:
        """Mean and log variance (within [-30, 20]) of the unscaled latents of a video in [-1, 1].

        Height and width are multiples of `config.spatial_stride` and f is 4k + 1; t is k + 1. All at once: see
        `mi_jax.models.tiling` for long or large videos.
        """
        mean, logvar = jnp.split(self.quant_conv(self.encoder(video)), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: Float[Array, "b t h w c"]) -> Float[Array, "b f H W 3"]:
        """Video around [-1, 1], not clipped, of unscaled latents."""
        return self.decoder(self.post_quant_conv(latents))

    def encode_latents(self, video: Float[Array, "b f H W 3"]) -> Float[Array, "b t h w c"]:
        """The denoiser's data: the mean times the scaling factor, of about unit scale."""
        return self.encode(video)[0] * self.config.scaling_factor

    def decode_latents(self, latents: Float[Array, "b t h w c"]) -> Float[Array, "b f H W 3"]:
        """Inverse of `encode_latents`."""
        return self.decode(latents / self.config.scaling_factor)
