"""What the denoiser's two scans repeat: dual-stream and single-stream blocks, and audio cross-attention.

Everything here is local code (`mesh.per_device`): on a mesh, a device has its share of the video's tokens and of the
text's, and `joint_attention` alone knows of the others.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from mi_jax.models.dit_config import DiTConfig, Kind
from mi_jax.models.layers import (
    MLP,
    LayerNorm,
    Modulation,
    RMSNorm,
    apply_rope,
    gelu_tanh,
    linear,
    modulate,
    per_token,
    zeros_init,
)
from mi_jax.models.sequence_parallel import joint_attention
from mi_jax.models.stack import stack_layers


class QKV(nnx.Module):
    """Queries, keys and values of one stream, with QK-norm per head and rotary positions where given."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        self.proj = linear(config.width, 3 * config.width, rngs=rngs)
        self.q_norm = RMSNorm(config.head_dim)
        self.k_norm = RMSNorm(config.head_dim)

    def __call__(self, x: Float[Array, "b n d"], rope=None) -> tuple[Array, Array, Array]:
        return self.split(self.proj(x), rope)

    def split(self, qkv: Float[Array, "b n e"], rope=None) -> tuple[Array, Array, Array]:
        q, k, v = split_heads(qkv, 3, self.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if rope is None else (apply_rope(q, rope), apply_rope(k, rope), v)


def split_heads(x: Float[Array, "*b e"], parts: int, heads: int) -> list[Float[Array, "*b k d"]]:
    """The `parts` (queries, keys, values) that one projection holds side by side, by heads; nothing is transposed."""
    return [rearrange(part, "... (k d) -> ... k d", k=heads) for part in jnp.split(x, parts, axis=-1)]


def merge_heads(x: Float[Array, "b n k d"]) -> Float[Array, "b n e"]:
    return rearrange(x, "b n k d -> b n (k d)")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What every block is told beside its tokens.

    On a mesh, what has an entry for each video token is spread as the tokens are. Fields are untyped: JAX also fills
    them with tracers and specs.
    """

    vector: Any
    """[b d] conditioning vector: timestep, pooled text, guidance."""
    vector_at_zero: Any = None
    """[b d] the same at time 0, for replaced tokens."""
    replaced: Any = None
    """[b n 1] bool: the tokens that the portrait's replace (token replace)."""
    rope: Any
    """(cos, sin) [n r] of the video tokens."""
    video_length: int = dataclasses.field(metadata={"static": True})
    """Video tokens there are, on all devices together."""
    text_length: Any
    """[b] valid text tokens."""
    audio: Any = None
    """[b s t a e] audio tokens; None where nothing is heard."""
    audio_mask: Any = None
    """[b s n] the face masks; the tokens past its end, if any, hear nothing."""
    frames: Any = None
    """[n] latent frame of each token; None where all tokens are on one device, frame by frame."""


def modulation_of(modulation: Modulation, context: Context, text: int = 0) -> list[Array]:
    """Shifts, scales and gates of the video tokens and of `text` tokens after them: `[b 1 d]` each, or, with token
    replace, `[b n d]`."""
    moving = modulation(context.vector)
    if context.replaced is None:
        return moving
    replaced = jnp.pad(context.replaced, ((0, 0), (0, text), (0, 0)))
    return [jnp.where(replaced, a, b) for a, b in zip(modulation(context.vector_at_zero), moving)]


class Stream(nnx.Module):
    """One of a double block's two streams: adaptive norms, its own projections and MLP."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.modulation = Modulation(config.width, 6, rngs=rngs)
        self.qkv = QKV(config, rngs=rngs)
        self.out = linear(config.width, config.width, rngs=rngs)
        self.mlp = MLP(config.width, config.mlp_ratio * config.width, gelu_tanh, rngs=rngs)

    def finish(self, x: Array, attended: Array, gate1: Array, shift2: Array, scale2: Array, gate2: Array) -> Array:
        x = x + per_token(gate1, x) * self.out(attended)
        return x + per_token(gate2, x) * self.mlp(modulate(x, shift2, scale2))


class DoubleBlock(nnx.Module):
    """Video and text with separate weights and one joint attention over [video, text]."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.video = Stream(config, rngs=rngs)
        self.text = Stream(config, rngs=rngs)

    def __call__(
        self, video: Float[Array, "b n d"], text: Float[Array, "b m d"], context: Context
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b m d"]]:
        shift_v, scale_v, *rest_v = modulation_of(self.video.modulation, context)
        shift_t, scale_t, *rest_t = self.text.modulation(context.vector)
        qkv_video = self.video.qkv(modulate(video, shift_v, scale_v), context.rope)
        qkv_text = self.text.qkv(modulate(text, shift_t, scale_t))
        attended_v, attended_t = attend(self.config, qkv_video, qkv_text, context)
        return self.video.finish(video, attended_v, *rest_v), self.text.finish(text, attended_t, *rest_t)


def attend(config: DiTConfig, video: tuple, text: tuple, context: Context) -> tuple[Array, Array]:
    """Joint attention of both streams, each given as its queries, keys and values."""
    streams = joint_attention(
        video,
        text,
        context.text_length,
        video_length=context.video_length,
        implementation=config.attention,
        ulysses=config.ulysses,
    )
    return tuple(merge_heads(stream) for stream in streams)


class SingleBlock(nnx.Module):
    """Attention and MLP side by side over the joint stream [video, text]."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        hidden = config.mlp_ratio * config.width
        self.modulation = Modulation(config.width, 3, rngs=rngs)
        self.qkv = QKV(config, rngs=rngs)
        self.mlp_in = linear(config.width, hidden, rngs=rngs)
        self.out = linear(config.width + hidden, config.width, rngs=rngs)

    def __call__(
        self, video: Float[Array, "b n d"], text: Float[Array, "b m d"], context: Context
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b m d"]]:
        n = video.shape[1]
        x = jnp.concatenate([video, text], axis=1)
        shift, scale, gate = modulation_of(self.modulation, context, text.shape[1])
        y = modulate(x, shift, scale)
        (q, k, v), qkv_text = zip(*((part[:, :n], part[:, n:]) for part in self.qkv(y)))
        qkv_video = apply_rope(q, context.rope), apply_rope(k, context.rope), v
        attended = jnp.concatenate(attend(self.config, qkv_video, qkv_text, context), axis=1)
        x = x + per_token(gate, x) * self.out(jnp.concatenate([attended, gelu_tanh(self.mlp_in(y))], axis=-1))
        return x[:, :n], x[:, n:]


class AudioAttention(nnx.Module):
    """Face-masked audio cross-attention (paper Eq. 2): `h += sum_s Attn(h, audio_s, audio_s) * mask_s`.

    The video tokens of a latent frame attend only to the audio tokens of that frame. The mask multiplies the
    output, so a token outside every mask receives exactly zero; the output projection starts at zero.
    """

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.heads = config.heads
        self.norm = LayerNorm(config.width)
        self.q = linear(config.width, config.width, rngs=rngs)
        self.kv = linear(config.audio.width, 2 * config.width, rngs=rngs)
        self.q_norm = RMSNorm(config.head_dim)
        self.k_norm = RMSNorm(config.head_dim)
        # No bias: a masked-in token with nothing attended must also get nothing.
        self.out = linear(config.width, config.width, bias=False, init=zeros_init, rngs=rngs)

    def __call__(
        self,
        video: Float[Array, "b n d"],
        audio: Float[Array, "b s t a e"],
        mask: Float[Array, "b s n"],
        frames: Int[Array, "n"] | None = None,
    ) -> Float[Array, "b n d"]:
        """`frames` is the latent frame of each token; None: all tokens are here, frame by frame."""
        t, a = audio.shape[2:4]
        q = rearrange(self.q(self.norm(video)), "b n (k d) -> b n k d", k=self.heads)
        k, v = split_heads(self.kv(audio), 2, self.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        q = q * q.shape[-1] ** -0.5
        if frames is None:
            q = rearrange(q, "b (t n) k d -> b t n k d", t=t)
            logits = jnp.einsum("btnkd,bstakd->bstnka", q, k, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
            attended = rearrange(jnp.einsum("bstnka,bstakd->bstnkd", weights, v), "b s t n k d -> b s (t n) (k d)")
        else:
            # A share of the tokens cuts through frames: all audio tokens at once, those of other frames masked. They
            # are few beside the video's.
            k, v = (rearrange(x, "b s t a k d -> b s (t a) k d") for x in (k, v))
            logits = jnp.einsum("bnkd,bsmkd->bsnkm", q, k, preferred_element_type=jnp.float32)
            same = (frames[:, None] == jnp.arange(t * a)[None] // a)[None, None, :, None]
            weights = jax.nn.softmax(jnp.where(same, logits, jnp.finfo(jnp.float32).min), axis=-1).astype(v.dtype)
            attended = rearrange(jnp.einsum("bsnkm,bsmkd->bsnkd", weights, v), "b s n k d -> b s n (k d)")
        # Masking before the (linear, bias-free) projection sums the speakers in one product; zero stays zero.
        return video + self.out(jnp.einsum("bsnd,bsn->bnd", attended, mask))


class Body(nnx.Module):
    """What a scan over depth repeats: `count` blocks of one kind, stacked, then audio attention if the config has it
    after that kind."""

    def __init__(self, config: DiTConfig, kind: Kind, rngs: nnx.Rngs):
        block = {"double": DoubleBlock, "single": SingleBlock}[kind]
        count = getattr(config, f"{kind}_per_body")
        self.blocks = stack_layers(lambda rngs: block(config, rngs=rngs), count, rngs)
        self.audio = AudioAttention(config, rngs=rngs) if config.hears(kind) else None
