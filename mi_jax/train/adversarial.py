"""A discriminator on the hidden states of a frozen denoiser (DMD2's adversarial term, with FastGen's frozen
features)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from mi_jax.conditions import Conditions
from mi_jax.mesh import batch_axis, gather_parameters, per_device
from mi_jax.models.dit import DiT
from mi_jax.models.dit_config import DiTConfig, Kind
from mi_jax.models.layers import layer_norm, linear
from mi_jax.models.sequence_parallel import AXIS

Taps = tuple[tuple[Kind, int], ...]


class TapHead(nnx.Module):
    """From each token of one tap to a logit."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.fc1, self.fc2 = linear(width, hidden, rngs=rngs), linear(hidden, 1, rngs=rngs)

    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b n"]:
        x = layer_norm(tokens).astype(self.fc1.kernel[...].dtype)
        return self.fc2(jax.nn.silu(self.fc1(x)))[..., 0].astype(jnp.float32)


class Discriminator(nnx.Module):
    """Whether latents are data's or a student's: the mean over video tokens and taps of a small head's logit.

    The features are contextual (full attention), so the heads need not be; and they are a frozen network's, so neither
    critic nor student can move them.
    """

    def __init__(self, config: DiTConfig, taps: Taps, hidden: int, *, rngs: nnx.Rngs):
        self.taps = taps
        self.heads = jax.vmap(lambda rngs: TapHead(config.width, hidden, rngs=rngs))(rngs.split(len(taps)))

    def __call__(
        self, features: DiT, latents: Float[Array, "b t h w c"], sigma: Float[Array, "b"], conditions: Conditions
    ) -> Float[Array, "b"]:
        """Logits of noised latents: high for the data's. Differentiable in latents and heads."""
        video, text, context = features.embed(latents, sigma, conditions)
        _, tapped = features.trunk(video, text, context, self.taps)
        tokens = jnp.stack([tapped[tap] for tap in self.taps])
        rows, count = batch_axis(latents), context.video_length

        def judge(heads, tokens):
            return jax.vmap(lambda head, tokens: head(tokens))(heads, tokens)

        logits = per_device(judge, P(None, rows, AXIS))(gather_parameters(self.heads), tokens)
        valid = jnp.arange(logits.shape[-1]) < count  # tokens are padded to what the mesh divides
        return jnp.sum(jnp.where(valid, logits, 0.0), axis=(0, 2)) / (count * len(self.taps))


def student_loss(fake: Float[Array, "b"]) -> Float[Array, "b"]:
    """What a student lowers by passing for data (non-saturating)."""
    return jax.nn.softplus(-fake)


def discriminator_loss(real: Float[Array, "b"], fake: Float[Array, "b"]) -> Float[Array, "b"]:
    """What the discriminator lowers by telling data from a student's."""
    return jax.nn.softplus(-real) + jax.nn.softplus(fake)
