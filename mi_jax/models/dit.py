"""The denoiser: HunyuanVideo's dual-stream to single-stream video DiT, told of portrait and audio (paper 3.1-3.2).

Depth is carried by two homogeneous scans. Body A is one double block (video and text keep their own weights, attention
is joint), body B two single blocks (one stream); after each body comes the face-masked audio cross-attention, if the
model has audio. A stage-1 model is the same tree without the audio leaves. The public HunyuanVideo weights map onto
this tree.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mi_jax.conditions import Conditions
from mi_jax.diffusion import TIMESTEPS
from mi_jax.mesh import apart, axis_size, batch_axis, gather_parameters, per_device
from mi_jax.models.attention import attention
from mi_jax.models.audio_encoder import AudioEncoder, audio_windows
from mi_jax.models.dit_blocks import DoubleBody, SingleBody, merge_heads, split_heads
from mi_jax.models.dit_config import DiTConfig, Remat
from mi_jax.models.layers import (
    MLP,
    LayerNorm,
    MLPEmbedder,
    Modulation,
    linear,
    modulate,
    rope_table,
    sinusoid,
    zeros_init,
)
from mi_jax.models.sequence_parallel import AXIS, local_shard

TIMESTEP_DIM = 256


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

    def encode_audio(self, steps: Float[Array, "b s n l d"], is_start: Float[Array, "b"]) -> Float[Array, "b s t a e"]:
        """Audio tokens of each speaker and latent frame from wav2vec2's states around them (`audio_encoder.cut_audio`),
        at a clip's start or within it."""

        def encode(encoder, steps, is_start):
            windows = jax.vmap(lambda voices, start: jax.vmap(lambda voice: audio_windows(voice, start))(voices))
            return encoder(windows(steps, is_start))

        encode = per_device(encode, P(batch_axis(steps)))
        return encode(gather_parameters(self.audio_in), steps.astype(self.dtype), is_start)

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
                replaced = local_shard(jnp.repeat(given[:, :, 0, 0], grid[1] * grid[2], axis=1))
            video = image_in(local_shard(_patches(config, latents, conditions).astype(dtype)))
            mask = _token_mask(config, conditions, t)
            mask = None if mask is None else local_shard(mask, 2).astype(dtype)
            return video, local_shard(text), replaced, mask

        hears = config.audio is not None and conditions.audio is not None
        out = (tokens, tokens, tokens if config.token_replace else None, P(rows[0], None, AXIS) if hears else None)
        video, text, replaced, mask = per_device(share, out)(image_in, latents, conditions, refined)
        audio = conditions.audio.astype(dtype) if hears else None

        def positions():
            return tuple(local_shard(part, 0) for part in rope_table(grid, config.rope_axes, config.rope_theta))

        rope = per_device(positions, (P(AXIS), P(AXIS)))()

        def listen(body, video, audio, mask):
            if audio is None:
                return video
            frames = None
            if axis_size(AXIS) > 1:
                own = video.shape[1]
                frames = (own * jax.lax.axis_index(AXIS) + jnp.arange(own)) // (grid[1] * grid[2])
            return body.audio(video, audio, mask, frames)

        def double_body(body, video, text, vec, at_zero, rope, length, replaced, audio, mask):
            vec = apart(vec, AXIS)
            still = None if replaced is None else (apart(at_zero, AXIS), replaced)
            video, text = body.block(video, text, vec, rope, n, length, still)
            return listen(body, video, audio, mask), text

        def single_body(body, x, vec, at_zero, rope, length, replaced, audio, mask):
            own, vec = rope[0].shape[0], apart(vec, AXIS)
            still = None
            if replaced is not None:
                still = (apart(at_zero, AXIS), jnp.pad(replaced, ((0, 0), (0, x.shape[1] - own), (0, 0))))
            for block in (body.first, body.second):
                x = block(x, vec, rope, n, length, still)
            return jnp.concatenate([listen(body, x[:, :own], audio, mask), x[:, own:]], axis=1)

        told = (vec, at_zero, rope, length, replaced, audio, mask)

        def double(carry, body):
            return per_device(double_body, (tokens, tokens))(gather_parameters(body), *carry, *told), None

        def single(x, body):
            return per_device(single_body, tokens)(gather_parameters(body), x, *told), None

        double, single = (_rematerialised(f, config.remat) for f in (double, single))
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


def _rematerialised(body: Callable, remat: Remat) -> Callable:
    """A scan's body whose backward pass computes its activations again from the tokens that entered it."""
    if remat == "none":
        return body
    policy = None
    if remat == "offload":
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["tokens"],
            offload_src="device",
            offload_dst="pinned_host",
        )

    def named(carry, parameters):
        return body(jax.tree.map(lambda tokens: checkpoint_name(tokens, "tokens"), carry), parameters)

    return jax.checkpoint(named, prevent_cse=False, policy=policy)


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
