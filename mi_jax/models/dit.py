"""The denoiser: HunyuanVideo's dual-stream to single-stream video DiT, told of portrait and audio (paper 3.1-3.2).

Depth is carried by two homogeneous scans: over bodies of double blocks (video and text keep their own weights,
attention is joint), then over bodies of single blocks (one stream). A body is one block or several, and then the
face-masked audio cross-attention, if the model has audio there. A stage-1 model is the same tree without the audio
leaves. The public HunyuanVideo weights map onto this tree.
"""

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
from mi_jax.models.audio_encoder import AudioEncoder, audio_windows
from mi_jax.models.dit_blocks import Body, Context
from mi_jax.models.dit_config import DiTConfig, Kind
from mi_jax.models.dit_text import TIMESTEP_DIM, TokenRefiner
from mi_jax.models.dit_trunk import scan_bodies
from mi_jax.models.layers import (
    MLPEmbedder,
    Modulation,
    grid_positions,
    linear,
    modulate,
    rope_table,
    sinusoid,
    zeros_init,
)
from mi_jax.models.sequence_parallel import AXIS, local_shard
from mi_jax.models.stack import stack_layers


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
    `mi_jax.diffusion`. It is `embed`, `trunk` and `unembed`, one after the other."""

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
        self.double = stack_layers(partial(Body, config, "double"), config.bodies("double"), rngs)
        self.single = stack_layers(partial(Body, config, "single"), config.bodies("single"), rngs)
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
        video, text, context = self.embed(latents, sigma, conditions)
        video, _ = self.trunk(video, text, context)
        return self.unembed(video, context, latents, sigma, conditions)

    def embed(
        self,
        latents: Float[Array, "b t h w c"],
        sigma: Float[Array, "b"],
        conditions: Conditions,
        *,
        extra_latents: Float[Array, "b r h w c"] | None = None,
        extra_times: Float[Array, "r"] | None = None,
        extra_vector: Float[Array, "b d"] | None = None,
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b m d"], Context]:
        """Video tokens, text tokens, and what all blocks are told.

        On a mesh both kinds of tokens are spread over `seq`, padded at the end where it does not divide them.

        Args:
          extra_latents: latent frames (references) whose tokens stand after the video's. They are attended to as the
            video's are, hear nothing, and no velocity is made of them. In a model with channels for portrait and mask
            these are 0 there.
          extra_times: where in time their rotary positions are, in latent frames; the video's are 0, 1, ...
          extra_vector: added to the conditioning vector.
        """
        config, dtype = self.config, self.dtype
        rows, tokens, own = P(batch_axis(latents)), P(batch_axis(latents), AXIS), P(AXIS)
        if jax.sharding.get_abstract_mesh().size > 1:
            beside = (sigma, conditions, extra_latents, extra_vector)
            sigma, conditions, extra_latents, extra_vector = jax.tree.map(lambda x: jax.reshard(x, rows), beside)
        timestep, vector, vector_at_zero = self._vectors(sigma, conditions, extra_vector)
        text, text_length = per_device(_text_tokens, (rows, rows))(conditions)
        text = self.text_in(text.astype(dtype), timestep, text_length)
        t, h, w = _token_grid(config, latents)
        times = jnp.arange(t, dtype=jnp.float32)
        times = times if extra_latents is None else jnp.concatenate([times, extra_times.astype(jnp.float32)])
        heard = config.audio is not None and conditions.audio is not None
        spread = axis_size(AXIS) > 1

        def share(image_in, latents, extra_latents, conditions, text, times):
            """What a device starts with: its share of video and text tokens, of their positions and of the masks."""
            replaced, mask, frames = None, None, None
            extra = (len(times) - t) * h * w
            if config.token_replace:
                given = _first_frame(latents, conditions)
                latents = jnp.where(given, conditions.portrait.astype(latents.dtype)[:, None], latents)
                replaced = jnp.repeat(given[:, :, 0, 0], h * w, axis=1)
                replaced = local_shard(jnp.pad(replaced, ((0, 0), (0, extra), (0, 0))))
            patches = _patches(config, _input_channels(config, latents, conditions))
            if extra_latents is not None:
                blank = jnp.zeros(
                    (*extra_latents.shape[:-1], config.in_channels - config.latent_channels), latents.dtype
                )
                references = jnp.concatenate([extra_latents.astype(latents.dtype), blank], axis=-1)
                patches = jnp.concatenate([patches, _patches(config, references)], axis=1)
            video = image_in(local_shard(patches.astype(dtype)))
            rope = rope_table(local_shard(grid_positions(times, h, w), 0), config.rope_axes, config.rope_theta)
            if heard:
                mask = _token_mask(config, conditions, t).astype(dtype)
            if heard and spread:
                mask = local_shard(jnp.pad(mask, ((0, 0), (0, 0), (0, extra))), 2)
                frames = local_shard(jnp.arange((t * h * w) + extra) // (h * w), 0)
            return video, local_shard(text), rope, replaced, mask, frames

        out = (
            tokens,
            tokens,
            (own, own),
            tokens if config.token_replace else None,
            P(rows[0], None, AXIS) if heard else None,
            own if heard and spread else None,
        )
        video, text, rope, replaced, mask, frames = per_device(share, out)(
            gather_parameters(self.image_in), latents, extra_latents, conditions, text, times
        )
        context = Context(
            vector=vector,
            vector_at_zero=vector_at_zero,
            replaced=replaced,
            rope=rope,
            video_length=len(times) * h * w,
            text_length=text_length,
            audio=conditions.audio.astype(dtype) if heard else None,
            audio_mask=mask,
            frames=frames,
        )
        return video, text, context

    def _vectors(self, sigma: Array, conditions: Conditions, extra: Array | None) -> tuple[Array, Array, Array | None]:
        """The embedded timestep's sinusoid, the conditioning vector, and the latter at time 0 (token replace)."""
        time_in, pooled_in, guidance_in = gather_parameters((self.time_in, self.pooled_in, self.guidance_in))
        lift = lambda level: sinusoid(TIMESTEPS * level, TIMESTEP_DIM).astype(self.dtype)  # noqa: E731
        pooled = 0 if pooled_in is None else pooled_in(conditions.text_pooled.astype(self.dtype))
        timestep, at_zero = lift(sigma), None
        vector = time_in(timestep) + pooled
        if self.config.token_replace:
            at_zero = time_in(lift(jnp.zeros_like(sigma))) + pooled
        if guidance_in is not None:
            vector = vector + guidance_in(lift(conditions.guidance))
        if extra is not None:
            extra = extra.astype(self.dtype)
            vector, at_zero = vector + extra, None if at_zero is None else at_zero + extra
        return timestep, vector, at_zero

    def trunk(
        self,
        video: Float[Array, "b n d"],
        text: Float[Array, "b m d"],
        context: Context,
        taps: tuple[tuple[Kind, int], ...] = (),
    ) -> tuple[Float[Array, "b n d"], dict[tuple[Kind, int], Float[Array, "b n d"]]]:
        """All blocks: the last hidden states of the video tokens, and those after each block that `taps` names.

        ("double", 3) is the fourth double block; audio attention that stands after it is not yet in its hidden states.
        Those of the blocks that are not named are not kept.

        Raises:
          ValueError: there is no block of such a name.
        """
        config = self.config
        for kind, number in taps:
            if not 0 <= number < getattr(config, f"{kind}_depth"):
                raise ValueError(f"no {kind} block {number} to tap: there are {getattr(config, f'{kind}_depth')}")
        tapped = {}
        for kind, bodies in (("double", self.double), ("single", self.single)):
            numbers = tuple(number for tapped_kind, number in taps if tapped_kind == kind)
            (video, text), hidden = scan_bodies(config, kind, bodies, (video, text), context, numbers)
            tapped |= {(kind, number): hidden[slot] for slot, number in enumerate(numbers)}
        return video, tapped

    def unembed(
        self,
        video: Float[Array, "b n d"],
        context: Context,
        latents: Float[Array, "b t h w c"],
        sigma: Float[Array, "b"],
        conditions: Conditions,
    ) -> Float[Array, "b t h w c"]:
        """Velocity of `latents`, f32, from the trunk's last hidden states; the rest as `embed` was given it."""
        config, rows = self.config, P(batch_axis(latents))
        t, h, w = _token_grid(config, latents)

        def project(final, video, vector):
            return final(video, vector).astype(jnp.float32)

        def unpatch(patches, latents, sigma, conditions):
            velocity = rearrange(
                patches[:, : t * h * w],
                "b (t h w) (c p q) -> b t (h p) (w q) c",
                t=t, h=h, w=w, p=config.patch[1], q=config.patch[2],
            )  # fmt: skip
            if config.token_replace:
                level = jnp.maximum(sigma, 1e-6).reshape(-1, 1, 1, 1, 1)
                there = (latents.astype(jnp.float32) - conditions.portrait[:, None].astype(jnp.float32)) / level
                velocity = jnp.where(_first_frame(latents, conditions), there, velocity)
            return velocity

        tokens = P(rows[0], AXIS)
        patches = per_device(project, tokens)(gather_parameters(self.final), video, context.vector)
        if jax.sharding.get_abstract_mesh().size > 1:
            patches, sigma, conditions = jax.tree.map(lambda x: jax.reshard(x, rows), (patches, sigma, conditions))
        return per_device(unpatch, rows)(patches, latents, sigma, conditions)


def _token_grid(config: DiTConfig, latents: Array) -> tuple[int, int, int]:
    t, h, w = latents.shape[1:4]
    return t, h // config.patch[1], w // config.patch[2]


def _input_channels(config: DiTConfig, latents: Array, conditions: Conditions) -> Float[Array, "b t h w c"]:
    """What the first projection sees; for image to video, noise + portrait (latent frame 0 only) + start mask (paper
    3.2)."""
    if not config.image_to_video:
        return latents
    t = latents.shape[1]
    first = (jnp.arange(t) == 0).astype(latents.dtype).reshape(1, t, 1, 1, 1)
    portrait = conditions.portrait.astype(latents.dtype)[:, None] * first
    start = conditions.is_start.astype(latents.dtype).reshape(-1, 1, 1, 1, 1) * first
    start = jnp.broadcast_to(start, (*latents.shape[:-1], 1))
    return jnp.concatenate([latents, portrait, start], axis=-1)


def _patches(config: DiTConfig, latents: Float[Array, "b t h w c"]) -> Float[Array, "b n e"]:
    return rearrange(latents, "b t (h p) (w q) c -> b (t h w) (c p q)", p=config.patch[1], q=config.patch[2])


def _token_mask(config: DiTConfig, conditions: Conditions, t: int) -> Float[Array, "b s n"]:
    """The face mask at token resolution, max-pooled so that small faces survive."""
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
