"""The denoiser's text: the MLLM's hidden states refined by a small transformer of their own."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mi_jax.mesh import batch_axis, gather_parameters, per_device
from mi_jax.models.attention import attention
from mi_jax.models.dit_blocks import merge_heads, split_heads
from mi_jax.models.dit_config import DiTConfig
from mi_jax.models.dit_trunk import rematerialised
from mi_jax.models.layers import MLP, LayerNorm, MLPEmbedder, Modulation, linear

TIMESTEP_DIM = 256
"""Of the sinusoids that embed a timestep."""


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

        return jax.lax.scan(rematerialised(body, "none"), x, self.blocks)[0]
