"""Audio tokens of each latent frame from wav2vec2's hidden states (paper 3.2: "the audio encoder resamples").

Each video frame sees a window of 10 wav2vec2 steps (50 Hz, so about +-100 ms) x all hidden states. The 4 video frames
of a latent frame are resampled together to 4 tokens by learned queries; positions are sin-cos, 1/4 of the dims for the
frame within its latent frame, 3/4 for the place in the window (the sizes follow Magic-1-For-1, by the paper's authors).
Nothing knows which latent frame it is, so audio may be shifted, cut and windowed at will.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from mi_jax.bounds import Depth, Heads, Ratio, Width, Within, check_fields
from mi_jax.errors import InputError
from mi_jax.mesh import vary_like
from mi_jax.models.attention import attention
from mi_jax.models.layers import LayerNorm, linear
from mi_jax.models.stack import stack_layers

lecun = nnx.initializers.lecun_normal()

FRAMES = 4  # video frames of a latent frame: the VAE's stride in time
WINDOW = 10  # wav2vec2 steps that a video frame sees
BEFORE = 4  # of them, steps before the frame's own two


def audio_steps(start: int, length: int) -> range:
    """The 8 * length + 8 wav2vec2 steps around latent frames `start` .. `start + length - 1` of a clip, all that
    `audio_windows` needs of it. They begin at step 8 * start - 10, the first that video frame 4 * start - 3 sees."""
    first = 2 * (FRAMES * start - (FRAMES - 1)) - BEFORE
    return range(first, first + 2 * FRAMES * length + WINDOW - 2)


def cut_audio(hidden: Float[np.ndarray, "s l d"], start: int, length: int) -> Float[np.ndarray, "n l d"]:
    """`audio_steps` of a clip's states; those outside the clip are zero.

    Raises ValueError if `hidden` is not two steps for each of 4k + 1 video frames.
    """
    num_steps = hidden.shape[0]
    if num_steps % (2 * FRAMES) != 2:
        raise ValueError(f"{num_steps} audio steps are not two for each of 4k + 1 video frames")
    steps = np.array(audio_steps(start, length))
    inside = (steps >= 0) & (steps < num_steps)
    return np.where(inside[:, None, None], hidden[np.clip(steps, 0, num_steps - 1)], np.zeros((), hidden.dtype))


def audio_windows(steps: Float[Array, "n l d"], is_start: Float[Array, ""]) -> Float[Array, "t 4 10 l d"]:
    """What each video frame of `cut_audio`'s latent frames sees: [t, 4, 10, L, D] with t = (n - 8) / 8.

    Video frame f sees steps 2f - 4 .. 2f + 5. Latent frame k is frames 4k - 3 .. 4k; where the cut is a clip's start
    (`is_start` > 0), latent 0 is frame 0 four times.
    """
    t = (steps.shape[0] - (WINDOW - 2)) // (2 * FRAMES)
    places = 2 * np.arange(FRAMES * t).reshape(t, FRAMES, 1) + np.arange(WINDOW)
    windows = steps[places]
    first = jnp.where(is_start > 0, windows[:1, -1:], windows[:1])
    return jnp.concatenate([first, windows[1:]])


def sincos(position: np.ndarray, dim: int, length: int) -> np.ndarray:
    """Sines, then cosines, of `position` at dim / 2 frequencies from pi down to pi / length: [*position, dim], f64.

    The usual range (1 to 1 / 10,000) leaves the few places of a latent frame nearly parallel: with it attention cannot
    start local.
    """
    frequencies = np.pi * float(length) ** -np.linspace(0, 1, dim // 2)
    angle = np.asarray(position, np.float64)[..., None] * frequencies
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)


def token_positions(layers: int, dim: int) -> Float[np.ndarray, "4 10 {layers} {dim}"]:
    """Positions of a latent frame's tokens: dim / 4 for the frame in it (0..3), 3 dim / 4 for step * layers + layer."""
    temporal = sincos(np.arange(FRAMES), dim // 4, FRAMES)[:, None, None]
    place = place_positions(layers, dim, 0, WINDOW)[None]
    shape = (FRAMES, WINDOW, layers)
    parts = [np.broadcast_to(part, shape + part.shape[-1:]) for part in (temporal, place)]
    return np.concatenate(parts, axis=-1).astype(np.float32)


def place_positions(layers: int, dim: int, start: int, stop: int) -> np.ndarray:
    """The 3 dim / 4 of `token_positions` that tell steps `start` .. `stop - 1` of a window and layers apart, f64."""
    places = np.arange(start, stop)[:, None] * layers + np.arange(layers)
    return sincos(places, dim - dim // 4, WINDOW * layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AudioEncoderConfig:
    """Sizes of the resampler.

    input_dim, layers: width and number of wav2vec2's hidden states.
    width, tokens: width and number of the audio tokens of a latent frame.
    heads, depth, mlp_ratio: of the cross-attention blocks.
    """

    input_dim: Annotated[int, Within(8, 8192)]
    layers: Annotated[int, Within(1, 256)]
    width: Width
    tokens: Annotated[int, Within(1, 256)] = 4
    heads: Heads
    depth: Depth
    mlp_ratio: Ratio = 4

    @classmethod
    def base(cls) -> "AudioEncoderConfig":
        """For wav2vec2-base: 13 states of 768 to 4 tokens of 768."""
        return cls(input_dim=768, layers=13, width=768, heads=12, depth=2)

    @classmethod
    def puppet(cls) -> "AudioEncoderConfig":
        """For the puppets' wav2vec2: 5 states of 128 to 4 tokens of 128."""
        return cls(input_dim=128, layers=5, width=128, heads=4, depth=1)

    def __post_init__(self):
        check_fields(self)
        if self.input_dim % 8 or self.width % self.heads:
            raise InputError(
                f"input_dim {self.input_dim} must divide by 8 and width {self.width} by {self.heads} heads"
            )


class ResamplerBlock(nnx.Module):
    """Cross-attention from a latent frame's queries to its tokens, then an MLP, both residual and pre-norm.

    The query projection starts as a multiple of the key projection, so a query attends to where its own position
    matches.
    """

    def __init__(self, config: AudioEncoderConfig, sharpness: float, rngs: nnx.Rngs):
        width = config.width
        self.query_norm = LayerNorm(config.input_dim, eps=1e-5)
        self.key = linear(config.input_dim, width, init=lecun, rngs=rngs)
        self.query = linear(config.input_dim, width, init=lecun, rngs=rngs)
        self.query.kernel = nnx.Param(sharpness * self.key.kernel[...])
        self.value = linear(config.input_dim, width, init=lecun, rngs=rngs)
        self.out = linear(width, config.input_dim, init=lecun, rngs=rngs)
        self.mlp_norm = LayerNorm(config.input_dim, eps=1e-5)
        self.mlp_in = linear(config.input_dim, config.mlp_ratio * width, init=lecun, rngs=rngs)
        self.mlp_out = linear(config.mlp_ratio * width, config.input_dim, init=lecun, rngs=rngs)
        self.heads = config.heads

    def __call__(self, x: Float[Array, "b a i"], tokens: Float[Array, "b n i"]) -> Float[Array, "b a i"]:
        q, k, v = (
            rearrange(y, "b n (h d) -> b n h d", h=self.heads)
            for y in (self.query(self.query_norm(x)), self.key(tokens), self.value(tokens))
        )
        # Four queries leave nothing for a fused kernel to save.
        heard = attention(q, k, v, implementation="xla")
        x = x + self.out(rearrange(heard, "b a h d -> b a (h d)"))
        return x + self.mlp_out(jax.nn.gelu(self.mlp_in(self.mlp_norm(x)), approximate=True))


class AudioEncoder(nnx.Module):
    """Learned queries over the 4 x 10 x L tokens of one latent frame; every latent frame for itself.

    Why the queries do not start at random: with random queries attention starts uniform over 160 ms x all layers, every
    token of a latent frame starts as the same average, and the lips get a blur of the sound until training has found
    time. So query i starts as the position of the two steps that frame i owns (mean over the hidden states), and the
    query projection as a multiple of the key projection: matching positions score highest, and token i starts as the
    sound of frame i. All of it is learned from there.
    """

    def __init__(self, config: AudioEncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        # With more or fewer tokens than frames the queries are spread over the latent frame's time.
        frame = (np.arange(config.tokens) + 0.5) * FRAMES / config.tokens - 0.5
        place = place_positions(config.layers, config.input_dim, BEFORE, BEFORE + 2).astype(np.float32).mean((0, 1))
        temporal = sincos(frame, config.input_dim // 4, FRAMES).astype(np.float32)
        queries = np.concatenate([temporal, np.broadcast_to(place, (config.tokens, place.size))], axis=-1)
        self.queries = nnx.Param(jnp.asarray(queries))
        self.token_norm = LayerNorm(config.input_dim, eps=1e-5)
        # A factor of 16 instead of 1 on the scores (before division by sqrt(head_dim)) gives a token's own frame, a
        # quarter of what it sees, most of the attention, over some 20 tokens: local, and far from saturated. With 1 it
        # starts nearly uniform.
        sharpness = 16 / math.sqrt(config.width // config.heads)
        self.blocks = stack_layers(lambda rngs: ResamplerBlock(config, sharpness, rngs), config.depth, rngs)
        self.final_norm = LayerNorm(config.input_dim, eps=1e-5)
        same = config.width == config.input_dim
        self.out = None if same else linear(config.input_dim, config.width, init=lecun, rngs=rngs)

    def __call__(self, windows: Float[Array, "*b t frames steps l d"]) -> Float[Array, "*b t a e"]:
        """Audio tokens [... t a e] of windows [... t 4 10 L D] (`audio_windows`), in the dtype of the parameters.

        Zero windows (outside the clip) are tokens like others: they say "no sound known here", which the positions
        place.
        """
        config = self.config
        expected = (FRAMES, WINDOW, config.layers, config.input_dim)
        if windows.shape[-4:] != expected:
            raise ValueError(f"audio windows end in {windows.shape[-4:]}, this encoder takes {expected}")
        encode = self._encode
        for _ in windows.shape[:-5]:
            encode = jax.vmap(encode)  # mapped, not merged: a batch axis may be spread over a mesh
        return encode(windows.astype(self.queries[...].dtype))

    def _encode(self, windows: Float[Array, "t frames steps l d"]) -> Float[Array, "t a e"]:
        positions = token_positions(self.config.layers, self.config.input_dim)[None]
        tokens = self.token_norm(windows + jnp.asarray(positions, windows.dtype))
        tokens = rearrange(tokens, "t f w l d -> t (f w l) d")
        x = jnp.broadcast_to(self.queries[...][None], (tokens.shape[0], *self.queries.shape))
        x, _ = jax.lax.scan(lambda x, block: (block(x, tokens), None), vary_like(x, tokens), self.blocks)
        x = self.final_norm(x)
        return x if self.out is None else self.out(x)
