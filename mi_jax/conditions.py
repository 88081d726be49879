"""What the denoiser is told, as one pytree."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


@runtime_checkable
class Windowed(Protocol):
    """What the sampler asks of conditions: a pytree, every leaf with the batch axis first, that cuts itself.
    `Conditions` is one; a velocity of one's own may be told of any other."""

    def window(self, start: int | Array, length: int) -> "Windowed":
        """Those of latent frames `[start, start + length)`; `start` may be traced."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Conditions:
    """Portrait, text, voices and face regions for a batch of videos (or of windows of one video).

    Every leaf has the batch axis first, so that conditions batch, shard and map like any array. An absent part is
    `None`; a part that is present but *dropped* (for classifier-free guidance) is masked or zero, which means the same
    to the denoiser: nothing is attended, nothing is added.

    Shapes stand in the fields' docstrings, not in their types: JAX rebuilds this tree with tracers, abstract arrays and
    specs for leaves.
    Axes: b batch, n text tokens, m image tokens, s speakers, t latent frames, a audio tokens of a latent frame.
    """

    text_tokens: Any
    """[b n d] hidden states of the MLLM at the prompt."""
    text_mask: Any
    """[b n] bool, false at padding."""
    text_pooled: Any = None
    """[b p] CLIP's pooled text vector."""
    image_tokens: Any = None
    """[b m d] hidden states of the MLLM at the portrait; they stand before the text tokens."""
    image_mask: Any = None
    """[b m] bool."""
    portrait: Any = None
    """[b h w c] VAE latents of the portrait, given at latent frame 0 of every window as identity."""
    is_start: Any = None
    """[b] 1 where latent frame 0 of this window *is* the portrait (the video starts here), else 0."""
    audio: Any = None
    """[b s t a d] audio tokens of each speaker (`DiT.encode_audio`)."""
    face_mask: Any = None
    """[b s h w] or [b s t h w]: where each speaker's audio acts, at latent resolution, in [0, 1]. All zero means no
    audio, exactly."""
    guidance: Any = None
    """[b] embedded guidance scale, for models distilled with one (HunyuanVideo: 6.0)."""

    @property
    def batch_size(self) -> int:
        return self.text_tokens.shape[0]

    def window(self, start: int | Array, length: int) -> "Conditions":
        """The conditions of latent frames `[start, start + length)`. `start` may be traced.

        Only a window at 0 begins with the portrait, so `is_start` is kept there and 0 elsewhere. The caller keeps
        `start + length` within the video: out-of-range windows are clamped, as `lax.dynamic_slice` does.
        """

        def cut(value: Array | None) -> Array | None:
            return None if value is None else jax.lax.dynamic_slice_in_dim(value, start, length, axis=2)

        moving_mask = self.face_mask is not None and self.face_mask.ndim == 5
        is_start = None if self.is_start is None else jnp.where(jnp.asarray(start) == 0, self.is_start, 0.0)
        return dataclasses.replace(
            self,
            audio=cut(self.audio),
            face_mask=cut(self.face_mask) if moving_mask else self.face_mask,
            is_start=is_start,
        )

    def drop(
        self,
        *,
        text: bool | Bool[Array, "b"] = False,
        image: bool | Bool[Array, "b"] = False,
        audio: bool | Bool[Array, "b"] = False,
    ) -> "Conditions":
        """Without the given parts, for some or all examples (condition dropout and guidance, paper Eq. 7).

        Text: no token is attended and the pooled vector is 0. Image: the same of the MLLM's image tokens, and portrait
        latents and start mask are 0. Audio: the face mask is 0, which is exactly no audio.
        """

        def kept(value: Array | None, dropped: bool | Array) -> Array | None:
            if value is None:
                return None
            keep = jnp.broadcast_to(jnp.logical_not(dropped), (value.shape[0],))
            keep = keep.reshape(keep.shape + (1,) * (value.ndim - 1))
            return jnp.where(keep, value, jnp.zeros((), value.dtype))

        return dataclasses.replace(
            self,
            text_mask=kept(self.text_mask, text),
            text_pooled=kept(self.text_pooled, text),
            image_mask=kept(self.image_mask, image),
            portrait=kept(self.portrait, image),
            is_start=kept(self.is_start, image),
            face_mask=kept(self.face_mask, audio),
        )


def concatenate(parts: list[Conditions]) -> Conditions:
    """Conditions of the same structure, joined along the batch axis (the branches of guidance)."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=0), *parts)
