"""The denoiser: HunyuanVideo's dual-stream to single-stream video DiT, told of portrait and audio (paper 3.1-3.2).

Depth is carried by two homogeneous scans. Body A is one double block (video and text keep their own weights, attention
is joint), body B two single blocks (one stream); after each body comes the face-masked audio cross-attention, if the
model has audio. A stage-1 model is the same tree without the audio leaves. The public HunyuanVideo weights map onto
this tree.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mi_jax.conditions import Conditions
from mi_jax.diffusion import TIMESTEPS
from mi_jax.mesh import axis_size, batch_axis, gather_parameters, per_device
from mi_jax.models.attention import Implementation, attention
from mi_jax.models.audio_encoder import AudioEncoder, AudioEncoderConfig
from mi_jax.models.layers import (
    MLP,
    LayerNorm,
    MLPEmbedder,
    Modulation,
    RMSNorm,
    apply_rope,
    gelu_tanh,
    linear,
    modulate,
    rope_table,
    sinusoid,
    zeros_init,
)
from mi_jax.models.sequence_parallel import AXIS, joint_attention, own_share

TIMESTEP_DIM = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shape of the denoiser. Defaults are HunyuanVideo's (`HYVideo-T/2`)."""

    latent_channels: int = 16
    image_to_video: bool = False
    """Adds portrait latents and a start mask to the input channels: 2 * latent_channels + 1 in all."""
    token_replace: bool = False
    """The other way from image to video (HunyuanVideo-I2V): in a window that starts with the portrait, its latents take
    the place of latent frame 0, whose tokens are modulated as at time 0."""
    patch: tuple[int, int, int] = (1, 2, 2)
    width: int = 3072
    heads: int = 24
    mlp_ratio: int = 4
    double_depth: int = 20
    single_depth: int = 40
    """Even: two single blocks make one scanned body."""
    refiner_depth: int = 2
    text_dim: int = 4096
    pooled_dim: int | None = 768
    guidance_embedding: bool = False
    rope_axes: tuple[int, int, int] = (16, 56, 56)
    rope_theta: float = 256.0
    audio: AudioEncoderConfig | None = None
    attention: Implementation = "auto"
    ulysses: int | None = None
    """How many devices of the mesh's `seq` axis exchange heads; the others pass keys around a ring. By default the most
    that divide both."""
    remat: bool = True
    """Recompute each body in the backward pass instead of keeping its activations."""
    unroll: int = 1
    """Bodies per step of the scans over depth. In small models the scan's own copies count: all of them at once are
    faster, and compile no longer."""

    def __post_init__(self):
        if self.width % self.heads or sum(self.rope_axes) != self.width // self.heads:
            raise ValueError(f"rope_axes {self.rope_axes} must sum to the head dim {self.width}/{self.heads}")
        if self.single_depth % 2 or self.patch[0] != 1:
            raise ValueError("single_depth must be even and the temporal patch 1")
        if self.image_to_video and self.token_replace:
            raise ValueError("a portrait is given as channels (image_to_video) or as tokens (token_replace), not both")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def in_channels(self) -> int:
        return 2 * self.latent_channels + 1 if self.image_to_video else self.latent_channels

    @classmethod
    def hunyuan_video(cls) -> "DiTConfig":
        """Tencent's 13B text-to-video model with embedded guidance: 12,821,012,544 parameters."""
        return cls(guidance_embedding=True)

    @classmethod
    def magic_infinite_13b(cls, audio: bool = True) -> "DiTConfig":
        """The paper's model: 33 input channels, no embedded guidance; 12,810,991,680 parameters without audio
        (stage 1)."""
        return cls(image_to_video=True, audio=AudioEncoderConfig.base() if audio else None)

    @classmethod
    def puppet(cls, audio: bool = True) -> "DiTConfig":
        """The toy of the same kind that this project trains: 96x96 puppets, 36 tokens a latent frame."""
        return cls(
            image_to_video=True,
            width=176,
            heads=4,
            double_depth=2,
            single_depth=4,
            refiner_depth=1,
            text_dim=128,
            pooled_dim=96,
            rope_axes=(12, 16, 16),
            audio=AudioEncoderConfig.puppet() if audio else None,
            remat=False,
            unroll=2,
        )


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


def modulation_of(modulation: Modulation, vec: Float[Array, "b d"], still: tuple[Array, Array] | None) -> list[Array]:
    """Shifts, scales and gates of the tokens: `[b 1 d]` each, or, with `still`, `[b n d]`.

    `still` is the conditioning vector at time 0 and which tokens [b n 1] take theirs from it (token replace).
    """
    moving = modulation(vec)
    if still is None:
        return moving
    vec_at_zero, tokens = still
    return [jnp.where(tokens, a, b) for a, b in zip(modulation(vec_at_zero), moving)]


class Stream(nnx.Module):
    """One of a double block's two streams: adaptive norms, its own projections and MLP."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.modulation = Modulation(config.width, 6, rngs=rngs)
        self.qkv = QKV(config, rngs=rngs)
        self.out = linear(config.width, config.width, rngs=rngs)
        self.mlp = MLP(config.width, config.mlp_ratio * config.width, gelu_tanh, rngs=rngs)

    def finish(self, x: Array, attended: Array, gate1: Array, shift2: Array, scale2: Array, gate2: Array) -> Array:
        x = x + gate1 * self.out(attended)
        return x + gate2 * self.mlp(modulate(x, shift2, scale2))


class DoubleBlock(nnx.Module):
    """Video and text with separate weights and one joint attention over [video, text]."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.video = Stream(config, rngs=rngs)
        self.text = Stream(config, rngs=rngs)

    def __call__(
        self, video: Array, text: Array, vec: Array, rope, n: int, length: Array, still
    ) -> tuple[Array, Array]:
        """`n` video tokens there are in all, and `length` [b] text tokens; a device has its share of both."""
        shift_v, scale_v, *rest_v = modulation_of(self.video.modulation, vec, still)
        shift_t, scale_t, *rest_t = self.text.modulation(vec)
        qkv_video = self.video.qkv(modulate(video, shift_v, scale_v), rope)
        qkv_text = self.text.qkv(modulate(text, shift_t, scale_t))
        heard = _attend(self.config, qkv_video, qkv_text, n, length)
        attended_v, attended_t = (merge_heads(part) for part in heard)
        return self.video.finish(video, attended_v, *rest_v), self.text.finish(text, attended_t, *rest_t)


def _attend(config: DiTConfig, video: tuple, text: tuple, n: int, length: Array) -> tuple[Array, Array]:
    return joint_attention(video, text, length, video_length=n, implementation=config.attention, ulysses=config.ulysses)


class SingleBlock(nnx.Module):
    """Attention and MLP side by side over the joint stream [video, text]."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        hidden = config.mlp_ratio * config.width
        self.modulation = Modulation(config.width, 3, rngs=rngs)
        self.qkv = QKV(config, rngs=rngs)
        self.mlp_in = linear(config.width, hidden, rngs=rngs)
        self.out = linear(config.width + hidden, config.width, rngs=rngs)

    def __call__(self, x: Array, vec: Array, rope, n: int, length: Array, still) -> Array:
        """A device's share of the video comes first (`rope` has a row for each token), then its share of the text."""
        shift, scale, gate = modulation_of(self.modulation, vec, still)
        y = modulate(x, shift, scale)
        share = rope[0].shape[0]
        qkv_video, qkv_text = zip(*((part[:, :share], part[:, share:]) for part in self.qkv(y)))
        q, k = (apply_rope(part, rope) for part in qkv_video[:2])
        heard = _attend(self.config, (q, k, qkv_video[2]), qkv_text, n, length)
        attended = merge_heads(jnp.concatenate(heard, axis=1))
        return x + gate * self.out(jnp.concatenate([attended, gelu_tanh(self.mlp_in(y))], axis=-1))


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
        """`frames` says which latent frame each token is of; None: all tokens are here, frame by frame."""
        t, a = audio.shape[2:4]
        q = rearrange(self.q(self.norm(video)), "b n (k d) -> b n k d", k=self.heads)
        k, v = split_heads(self.kv(audio), 2, self.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        q = q * q.shape[-1] ** -0.5
        if frames is None:
            q = rearrange(q, "b (t n) k d -> b t n k d", t=t)
            logits = jnp.einsum("btnkd,bstakd->bstnka", q, k, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
            heard = rearrange(jnp.einsum("bstnka,bstakd->bstnkd", weights, v), "b s t n k d -> b s (t n) (k d)")
        else:
            # A share of the tokens cuts through frames: all audio tokens at once, those of other frames masked. They
            # are few beside the video's.
            k, v = (rearrange(x, "b s t a k d -> b s (t a) k d") for x in (k, v))
            logits = jnp.einsum("bnkd,bsmkd->bsnkm", q, k, preferred_element_type=jnp.float32)
            same = (frames[:, None] == jnp.arange(t * a)[None] // a)[None, None, :, None]
            weights = jax.nn.softmax(jnp.where(same, logits, jnp.finfo(jnp.float32).min), axis=-1).astype(v.dtype)
            heard = rearrange(jnp.einsum("bsnkm,bsmkd->bsnkd", weights, v), "b s n k d -> b s n (k d)")
        # Masking before the (linear, bias-free) projection sums the speakers in one product; zero stays zero.
        return video + self.out(jnp.einsum("bsnd,bsn->bnd", heard, mask))


class DoubleBody(nnx.Module):
    """What the first scan repeats: a double block, then audio."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        self.block = DoubleBlock(config, rngs=rngs)
        self.audio = AudioAttention(config, rngs=rngs) if config.audio else None


class SingleBody(nnx.Module):
    """What the second scan repeats: two single blocks, then audio."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        self.first = SingleBlock(config, rngs=rngs)
        self.second = SingleBlock(config, rngs=rngs)
        self.audio = AudioAttention(config, rngs=rngs) if config.audio else None


class RefinerBlock(nnx.Module):
    """Self-attention and MLP over text tokens with two gates from the timestep and the mean text."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        self.heads = config.heads
        self.norm1 = LayerNorm(config.width)
        self.qkv = linear(config.width, 3 * config.width, rngs=rngs)
        self.out = linear(config.width, config.width, rngs=rngs)
        self.norm2 = LayerNorm(config.width)
        self.mlp = MLP(config.width, config.mlp_ratio * config.width, jax.nn.silu, rngs=rngs)
        self.gates = Modulation(config.width, 2, rngs=rngs)

    def __call__(self, x: Array, vec: Array, length: Array) -> Array:
        gate1, gate2 = self.gates(vec)
        q, k, v = split_heads(self.qkv(self.norm1(x)), 3, self.heads)
        x = x + gate1 * self.out(merge_heads(attention(q, k, v, length=length, implementation="xla")))
        return x + gate2 * self.mlp(self.norm2(x))


class TokenRefiner(nnx.Module):
    """Lifts the MLLM's hidden states to the width of the model (HunyuanVideo `token_refiner.py`)."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.embed = linear(config.text_dim, config.width, rngs=rngs)
        self.time = MLPEmbedder(TIMESTEP_DIM, config.width, rngs=rngs)
        self.mean = MLPEmbedder(config.text_dim, config.width, rngs=rngs)
        self.blocks = jax.vmap(partial(RefinerBlock, config))(rngs.split(config.refiner_depth))

    def __call__(self, tokens: Float[Array, "b n e"], timestep: Float[Array, "b f"], length: Int[Array, "b"]) -> Array:
        rows = P(batch_axis(tokens))

        def start(parts, tokens, timestep, length):
            embed, time, mean_in = parts
            valid = (jnp.arange(tokens.shape[1])[None, :] < length[:, None])[:, :, None]
            total = jnp.sum(jnp.where(valid, tokens.astype(jnp.float32), 0.0), axis=1)
            mean = total / jnp.maximum(length, 1).astype(jnp.float32)[:, None]
            return embed(tokens), time(timestep) + mean_in(mean.astype(tokens.dtype))

        parts = gather_parameters((self.embed, self.time, self.mean))
        x, vec = per_device(start, (rows, rows))(parts, tokens, timestep, length)

        def body(x, block):
            return per_device(RefinerBlock.__call__, rows)(gather_parameters(block), x, vec, length), None

        return jax.lax.scan(body, x, self.blocks)[0]


class FinalLayer(nnx.Module):
    """Adaptive norm and the projection to patches of velocity, zero-initialised."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.modulation = Modulation(config.width, 2, rngs=rngs)
        self.out = linear(
            config.width, config.patch[1] * config.patch[2] * config.latent_channels, init=zeros_init, rngs=rngs
        )

    def __call__(self, x: Array, vec: Array) -> Array:
        shift, scale = self.modulation(vec)
        return self.out(modulate(x, shift, scale))


class DiT(nnx.Module):
    """`dit(latents, sigma, conditions) -> velocity`: the denoiser u_theta of Eq. 1, in the convention of
    `mi_jax.diffusion`."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.image_in = linear(
            config.in_channels * config.patch[1] * config.patch[2], config.width, init=_patch_init(config), rngs=rngs
        )
        self.time_in = MLPEmbedder(TIMESTEP_DIM, config.width, rngs=rngs)
        self.pooled_in = MLPEmbedder(config.pooled_dim, config.width, rngs=rngs) if config.pooled_dim else None
        self.guidance_in = MLPEmbedder(TIMESTEP_DIM, config.width, rngs=rngs) if config.guidance_embedding else None
        self.text_in = TokenRefiner(config, rngs=rngs)
        self.audio_in = AudioEncoder(config.audio, rngs=rngs) if config.audio else None
        self.double = jax.vmap(partial(DoubleBody, config))(rngs.split(config.double_depth))
        self.single = jax.vmap(partial(SingleBody, config))(rngs.split(config.single_depth // 2))
        self.final = FinalLayer(config, rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """What the model computes in: the dtype of its parameters, cast once outside (f32 masters to bf16)."""
        return self.image_in.kernel[...].dtype

    def encode_audio(self, windows: Float[Array, "b s t four w l d"]) -> Float[Array, "b s t a e"]:
        """Audio tokens of each speaker and latent frame from wav2vec2 windows (`audio_encoder.audio_windows`)."""
        encode = per_device(AudioEncoder.__call__, P(batch_axis(windows)))
        return encode(gather_parameters(self.audio_in), windows.astype(self.dtype))

    def __call__(
        self, latents: Float[Array, "b t h w c"], sigma: Float[Array, "b"], conditions: Conditions
    ) -> Float[Array, "b t h w c"]:
        """Velocity `eps - x` at noise level `sigma` (already shifted), f32.

        The latent height and width are multiples of the patch (2). With token replace, the velocity of a given latent
        frame 0 is the one that leads to the portrait, so that a sampler arrives there, and a loss finds no error.
        """
        t, h, w = latents.shape[1:4]
        grid = (t, h // self.config.patch[1], w // self.config.patch[2])
        n = math.prod(grid)
        rows, tokens = P(batch_axis(latents)), P(batch_axis(latents), AXIS)
        if jax.sharding.get_abstract_mesh().size > 1:
            sigma, conditions = jax.tree.map(lambda leaf: jax.reshard(leaf, rows), (sigma, conditions))
        config, dtype = self.config, self.dtype
        image_in, time_in, pooled_in, guidance_in = gather_parameters(
            (self.image_in, self.time_in, self.pooled_in, self.guidance_in)
        )
        timestep = sinusoid(TIMESTEPS * sigma, TIMESTEP_DIM).astype(dtype)
        pooled = 0 if pooled_in is None else pooled_in(conditions.text_pooled.astype(dtype))
        vec = time_in(timestep) + pooled
        at_zero = None
        if config.token_replace:
            at_zero = time_in(sinusoid(jnp.zeros_like(sigma), TIMESTEP_DIM).astype(dtype)) + pooled
        if guidance_in is not None:
            vec = vec + guidance_in(sinusoid(TIMESTEPS * conditions.guidance, TIMESTEP_DIM).astype(dtype))

        given_text, length = per_device(_text_tokens, (rows, rows))(conditions)
        refined = self.text_in(given_text.astype(dtype), timestep, length)

        def share(image_in, latents, conditions, text):
            """What a device starts with: its share of video and text tokens, of their positions and of the masks."""
            replaced = None
            if config.token_replace:
                given = _first_frame(latents, conditions)
                latents = jnp.where(given, conditions.portrait.astype(latents.dtype)[:, None], latents)
                replaced = own_share(jnp.repeat(given[:, :, 0, 0], grid[1] * grid[2], axis=1))
            video = image_in(own_share(_patches(config, latents, conditions).astype(dtype)))
            mask = _token_mask(config, conditions, t)
            mask = None if mask is None else own_share(mask, 2).astype(dtype)
            return video, own_share(text), replaced, mask

        hears = config.audio is not None and conditions.audio is not None
        out = (tokens, tokens, tokens if config.token_replace else None, P(rows[0], None, AXIS) if hears else None)
        video, text, replaced, mask = per_device(share, out)(image_in, latents, conditions, refined)
        audio = conditions.audio.astype(dtype) if hears else None
        rope = per_device(lambda: tuple(map(own_share, rope_table(grid, config.rope_axes, config.rope_theta), (0, 0))),
                          (P(AXIS), P(AXIS)))()  # fmt: skip

        def listen(body, video, audio, mask):
            if audio is None:
                return video
            frames = None
            if axis_size(AXIS) > 1:
                own = video.shape[1]
                frames = (own * jax.lax.axis_index(AXIS) + jnp.arange(own)) // (grid[1] * grid[2])
            return body.audio(video, audio, mask, frames)

        def double_body(body, video, text, vec, at_zero, rope, length, replaced, audio, mask):
            still = None if replaced is None else (at_zero, replaced)
            video, text = body.block(video, text, vec, rope, n, length, still)
            return listen(body, video, audio, mask), text

        def single_body(body, x, vec, at_zero, rope, length, replaced, audio, mask):
            own = rope[0].shape[0]
            still = None
            if replaced is not None:
                still = (at_zero, jnp.pad(replaced, ((0, 0), (0, x.shape[1] - own), (0, 0))))
            for block in (body.first, body.second):
                x = block(x, vec, rope, n, length, still)
            return jnp.concatenate([listen(body, x[:, :own], audio, mask), x[:, own:]], axis=1)

        told = (vec, at_zero, rope, length, replaced, audio, mask)

        def double(carry, body):
            return per_device(double_body, (tokens, tokens))(gather_parameters(body), *carry, *told), None

        def single(x, body):
            return per_device(single_body, tokens)(gather_parameters(body), x, *told), None

        if config.remat:
            double, single = (jax.checkpoint(f, prevent_cse=False) for f in (double, single))
        video, text = jax.lax.scan(double, (video, text), self.double, unroll=config.unroll)[0]
        x = per_device(lambda *streams: jnp.concatenate(streams, axis=1), tokens)(video, text)
        x = jax.lax.scan(single, x, self.single, unroll=config.unroll)[0]

        def finish(final, x, vec):
            return final(x[:, : -(-n // axis_size(AXIS))], vec).astype(jnp.float32)

        def unpatch(patches, latents, sigma, conditions):
            velocity = rearrange(
                patches[:, :n],
                "b (t h w) (c p q) -> b t (h p) (w q) c",
                t=grid[0], h=grid[1], w=grid[2], p=config.patch[1], q=config.patch[2],
            )  # fmt: skip
            if config.token_replace:
                level = jnp.maximum(sigma, 1e-6).reshape(-1, 1, 1, 1, 1)
                there = (latents.astype(jnp.float32) - conditions.portrait[:, None].astype(jnp.float32)) / level
                velocity = jnp.where(_first_frame(latents, conditions), there, velocity)
            return velocity

        patches = per_device(finish, tokens)(gather_parameters(self.final), x, vec)
        if jax.sharding.get_abstract_mesh().size > 1:
            patches = jax.reshard(patches, rows)
        return per_device(unpatch, rows)(patches, latents, sigma, conditions)


def _patches(config: DiTConfig, latents: Array, conditions: Conditions) -> Float[Array, "b n e"]:
    """Input tokens; for image to video, noise + portrait (latent frame 0 only) + start mask (paper 3.2)."""
    if config.image_to_video:
        t = latents.shape[1]
        first = (jnp.arange(t) == 0).astype(latents.dtype).reshape(1, t, 1, 1, 1)
        portrait = conditions.portrait.astype(latents.dtype)[:, None] * first
        start = conditions.is_start.astype(latents.dtype).reshape(-1, 1, 1, 1, 1) * first
        start = jnp.broadcast_to(start, (*latents.shape[:-1], 1))
        latents = jnp.concatenate([latents, portrait, start], axis=-1)
    p, q = config.patch[1:]
    return rearrange(latents, "b t (h p) (w q) c -> b (t h w) (c p q)", p=p, q=q)


def _token_mask(config: DiTConfig, conditions: Conditions, t: int) -> Float[Array, "b s n"] | None:
    """The face mask at token resolution, max-pooled so that small faces survive; None where nothing is heard."""
    if config.audio is None or conditions.audio is None:
        return None
    mask = conditions.face_mask
    if mask.ndim == 4:
        mask = jnp.repeat(mask[:, :, None], t, axis=2)
    p, q = config.patch[1:]
    return reduce(mask, "b s t (h p) (w q) -> b s (t h w)", "max", p=p, q=q)


def _first_frame(latents: Array, conditions: Conditions) -> Bool[Array, "b t 1 1 1"]:
    """Where latents are the portrait's: at latent frame 0 of the windows that start a video."""
    first = (jnp.arange(latents.shape[1]) == 0).reshape(1, -1, 1, 1, 1)
    return first & (conditions.is_start > 0).reshape(-1, 1, 1, 1, 1)


def _text_tokens(conditions: Conditions) -> tuple[Float[Array, "b n e"], Int[Array, "b"]]:
    """Image tokens before text tokens, the valid ones moved to the front, and their number.

    The text stream has no positions, so its order is free; with the padding last, every attention kernel can be told of
    it by a length.
    """
    tokens, mask = conditions.text_tokens, conditions.text_mask
    if conditions.image_tokens is not None:
        tokens = jnp.concatenate([conditions.image_tokens.astype(tokens.dtype), tokens], axis=1)
        mask = jnp.concatenate([conditions.image_mask, mask], axis=1)
    order = jnp.argsort(jnp.logical_not(mask), axis=1, stable=True)
    return jnp.take_along_axis(tokens, order[:, :, None], axis=1), jnp.sum(mask, axis=1, dtype=jnp.int32)


def _patch_init(config: DiTConfig):
    """Xavier for the noise channels, zero for the channels that image-to-video adds (paper 3.2)."""

    def init(key, shape, dtype=jnp.float32, **_):
        pixels = config.patch[1] * config.patch[2]
        kernel = nnx.initializers.xavier_uniform()(key, (config.latent_channels * pixels, shape[1]), dtype)
        return jnp.concatenate([kernel, jnp.zeros((shape[0] - kernel.shape[0], shape[1]), dtype)], axis=0)

    return init
