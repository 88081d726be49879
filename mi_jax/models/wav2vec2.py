"""wav2vec 2.0, base architecture (Baevski et al. 2020): a voice as 50 vectors a second, every hidden state kept.

Seven strided convolutions turn 16 kHz samples into one vector per 20 ms (group norm after the first one only), a
grouped convolution adds relative position, and post-norm transformer layers follow. This is the variant of
`wav2vec2-base` and `wav2vec2-base-960h`; the large models' layer-norm feature extractor and pre-norm encoder are
another architecture.

The public weights parametrise the positional kernel by weight norm. Here the plain kernel is stored, which is the same
function: an importer folds `kernel[k, i, o] = g[k] * v[o, i, k] / |v[:, :, k]|` (the norm runs over inputs and outputs
of one tap). As in the reference for the base models there is no attention mask: padding is silence, and takes part.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from mi_jax.bounds import Channels, Depth, Epsilon, Heads, Taps, Width, check_fields
from mi_jax.errors import InputError
from mi_jax.models.attention import attention
from mi_jax.models.layers import LayerNorm
from mi_jax.models.stack import stack_layers
from mi_jax.rates import SAMPLE_RATE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wav2Vec2Config:
    """Sizes of a wav2vec2; the strides multiply to 320, 50 steps a second: a video frame (25 fps) owns two steps."""

    conv_dim: Channels
    conv_kernels: tuple[Taps, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_strides: tuple[Taps, ...] = (5, 2, 2, 2, 2, 2, 2)
    width: Width
    num_layers: Depth
    num_heads: Heads
    mlp_width: Width
    position_kernel: Taps
    position_groups: Heads
    norm_epsilon: Epsilon = 1e-5

    def __post_init__(self):
        check_fields(self)
        if len(self.conv_kernels) != len(self.conv_strides) or self.hop != SAMPLE_RATE // 50:
            raise InputError(
                f"conv_strides {self.conv_strides} of {len(self.conv_kernels)} kernels: one each, whose product is "
                f"{SAMPLE_RATE // 50}"
            )
        for name in ("num_heads", "position_groups"):
            if self.width % getattr(self, name):
                raise InputError(f"{name} {getattr(self, name)} does not divide a width of {self.width}")

    @classmethod
    def base(cls) -> "Wav2Vec2Config":
        """wav2vec2-base: 94.4 M parameters, 13 hidden states of 768."""
        return cls(
            conv_dim=512,
            width=768,
            num_layers=12,
            num_heads=12,
            mlp_width=3072,
            position_kernel=128,
            position_groups=16,
        )

    @classmethod
    def puppet(cls) -> "Wav2Vec2Config":
        """0.9 M parameters, 5 hidden states of 128; the positional kernel spans 0.64 s."""
        return cls(
            conv_dim=64, width=128, num_layers=4, num_heads=4, mlp_width=512, position_kernel=32, position_groups=8
        )

    @property
    def num_hidden_states(self) -> int:
        """The encoder's input and the output of each layer."""
        return self.num_layers + 1

    @property
    def hop(self) -> int:
        """Samples from one step to the next: 320, or 20 ms."""
        return math.prod(self.conv_strides)

    @property
    def receptive_field(self) -> int:
        """Samples that one step of the feature extractor sees: 400, or 25 ms, from the step's start on."""
        field = 1
        for kernel, stride in zip(reversed(self.conv_kernels), reversed(self.conv_strides), strict=True):
            field = (field - 1) * stride + kernel
        return field

    def num_steps(self, num_samples: int) -> int:
        """Steps that `num_samples` samples give (0 when they are shorter than one receptive field)."""
        return max(0, (num_samples - self.receptive_field) // self.hop + 1)

    def num_samples(self, num_steps: int) -> int:
        """The fewest samples that give `num_steps` steps."""
        return (num_steps - 1) * self.hop + self.receptive_field


class Conv1d(nnx.Module):
    """Convolution over time without bias; kernel [k, in, out], as `jax.lax` takes it channels-last."""

    def __init__(self, features_in: int, features_out: int, kernel: int, stride: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.he_normal()(rngs.params(), (kernel, features_in, features_out)))
        self.stride = stride

    def __call__(self, x: Float[Array, "b n i"]) -> Float[Array, "b t o"]:
        return jax.lax.conv_general_dilated(
            x, self.kernel[...], (self.stride,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
        )


class ChannelNorm(nnx.Module):
    """Group norm with one channel per group: each channel is normalised over time.

    The result at one time depends on all others, so a chunk of a long signal would be scaled by its own loudness (and a
    silent chunk blown up to the level of speech) unless it is given the whole signal's `moments`.
    """

    def __init__(self, features: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.epsilon = epsilon

    def __call__(
        self, x: Float[Array, "b t c"], moments: tuple[Float[Array, "c"], Float[Array, "c"]] | None = None
    ) -> Float[Array, "b t c"]:
        if moments is None:
            mean = jnp.mean(x, axis=1, keepdims=True)
            variance = jnp.var(x, axis=1, keepdims=True)
        else:
            mean, variance = (moment.reshape(1, 1, -1) for moment in moments)
        normal = (x - mean) * jax.lax.rsqrt(variance + self.epsilon)
        return normal * self.scale[...].reshape(1, 1, -1) + self.bias[...].reshape(1, 1, -1)


class PositionalConv(nnx.Module):
    """Relative position by a wide grouped convolution; with an even kernel the output's last step is dropped."""

    def __init__(self, config: Wav2Vec2Config, rngs: nnx.Rngs):
        shape = (config.position_kernel, config.width // config.position_groups, config.width)
        scale = 2 * math.sqrt(1 / (config.position_kernel * config.width))
        self.kernel = nnx.Param(scale * jax.random.normal(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros(config.width))
        self.groups = config.position_groups

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        half = self.kernel.shape[0] // 2
        position = jax.lax.conv_general_dilated(
            x,
            self.kernel[...],
            (1,),
            [(half, half)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=self.groups,
        )
        return jax.nn.gelu(position[:, : x.shape[1]] + self.bias[...].reshape(1, 1, -1), approximate=False)


class EncoderLayer(nnx.Module):
    """Self-attention and MLP, each followed by its residual sum's layer norm (post-norm)."""

    def __init__(self, config: Wav2Vec2Config, rngs: nnx.Rngs):
        width = config.width
        self.query = nnx.Linear(width, width, rngs=rngs)
        self.key = nnx.Linear(width, width, rngs=rngs)
        self.value = nnx.Linear(width, width, rngs=rngs)
        self.out = nnx.Linear(width, width, rngs=rngs)
        self.attention_norm = LayerNorm(width, eps=config.norm_epsilon)
        self.mlp_in = nnx.Linear(width, config.mlp_width, rngs=rngs)
        self.mlp_out = nnx.Linear(config.mlp_width, width, rngs=rngs)
        self.mlp_norm = LayerNorm(width, eps=config.norm_epsilon)
        self.num_heads = config.num_heads

    def __call__(self, x: Float[Array, "b t d"], length: Int[Array, "b"] | None = None) -> Float[Array, "b t d"]:
        q, k, v = (
            rearrange(project(x), "b t (h d) -> b t h d", h=self.num_heads)
            for project in (self.query, self.key, self.value)
        )
        attended = attention(q, k, v, length=length)
        x = self.attention_norm(x + self.out(rearrange(attended, "b t h d -> b t (h d)")))
        return self.mlp_norm(x + self.mlp_out(jax.nn.gelu(self.mlp_in(x), approximate=False)))


class Wav2Vec2(nnx.Module):
    """The encoder; f32 throughout (it is small beside the denoiser, and its features may be made ahead of training)."""

    def __init__(self, config: Wav2Vec2Config, *, rngs: nnx.Rngs):
        self.config = config
        channels = (1,) + (config.conv_dim,) * len(config.conv_kernels)
        self.convs = nnx.List(
            Conv1d(features_in, config.conv_dim, kernel, stride, rngs)
            for features_in, kernel, stride in zip(channels[:-1], config.conv_kernels, config.conv_strides, strict=True)
        )
        self.channel_norm = ChannelNorm(config.conv_dim, config.norm_epsilon)
        self.projection_norm = LayerNorm(config.conv_dim, eps=config.norm_epsilon)
        self.projection = nnx.Linear(config.conv_dim, config.width, rngs=rngs)
        self.position = PositionalConv(config, rngs)
        self.encoder_norm = LayerNorm(config.width, eps=config.norm_epsilon)
        self.layers = stack_layers(lambda rngs: EncoderLayer(config, rngs), config.num_layers, rngs)

    def __call__(
        self,
        waveform: Float[Array, "b n"],
        moments: tuple[Float[Array, "c"], Float[Array, "c"]] | None = None,
        num_steps: Int[Array, ""] | None = None,
    ) -> Float[Array, "b t l d"]:
        """Hidden states [b T L D] of a waveform at 16 kHz that `normalise` has been over; T = `config.num_steps(n)`.

        State 0 is the encoder's input (after position and norm), state l the output of layer l. `moments` (mean and
        variance per channel, see `first_conv_moments`) stand in for those of this waveform's own first convolution.
        `num_steps`: those from there on are filling; no other step sees them.
        """
        x = self.convs[0](waveform[:, :, None])
        x = jax.nn.gelu(self.channel_norm(x, moments), approximate=False)
        for conv in self.convs[1:]:
            x = jax.nn.gelu(conv(x), approximate=False)
        x = self.projection(self.projection_norm(x))
        length = None
        if num_steps is not None:
            length = jnp.full(x.shape[:1], num_steps)
            x = jnp.where(jnp.arange(x.shape[1])[:, None] < num_steps, x, 0)
        x = self.encoder_norm(x + self.position(x))

        def body(x, layer):
            x = layer(x, length)
            return x, x

        _, states = jax.lax.scan(body, x, self.layers)
        return rearrange(jnp.concatenate([x[None], states]), "l b t d -> b t l d")


def normalise(waveform: Float[Array | np.ndarray, "... n"]) -> Float[Array | np.ndarray, "... n"]:
    """Zero mean and unit variance over time, as wav2vec2's feature extractor does (epsilon 1e-7 inside the root).

    Loudness is thus lost on purpose; digital silence stays zero. A numpy array stays one.
    """
    xp = np if isinstance(waveform, np.ndarray) else jnp
    centred = waveform - xp.mean(waveform, axis=-1, keepdims=True)
    return centred / xp.sqrt(xp.var(waveform, axis=-1, keepdims=True) + 1e-7)
