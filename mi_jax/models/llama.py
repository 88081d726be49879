"""Llama's decoder (Touvron et al. 2023; Llama 3, 2024) as an encoder of tokens.

RMS norm, rotary positions, grouped-query causal attention, SwiGLU. No cache and no language head: it is only read.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mi_jax.bounds import Depth, Epsilon, Heads, Vocabulary, Width, Within, check_fields
from mi_jax.errors import InputError
from mi_jax.models.layers import RMSNorm, linear
from mi_jax.models.stack import lookup, run_layers, stack_layers


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes of a Llama decoder."""

    vocab_size: Vocabulary
    width: Width
    mlp_width: Width
    depth: Depth
    heads: Heads
    key_value_heads: Heads
    rope_theta: Annotated[float, Within(above=0, most=1e9)] = 10_000.0
    norm_eps: Epsilon = 1e-5

    def __post_init__(self):
        check_fields(self)
        if self.width % (2 * self.heads):
            raise InputError(f"a width of {self.width} gives {self.heads} heads no even size")
        if self.heads % self.key_value_heads:
            raise InputError(f"{self.key_value_heads} key_value_heads do not divide {self.heads} heads")

    @classmethod
    def llama3_8b(cls, vocab_size: int = 128_256) -> "LlamaConfig":
        """Llama-3-8B; fine-tunes that add tokens have a larger vocabulary."""
        return cls(
            vocab_size=vocab_size, width=4096, mlp_width=14336, depth=32, heads=32, key_value_heads=8,
            rope_theta=500_000.0,
        )  # fmt: skip


def rotary(x: Float[Array, "b n h c"], positions: Int[Array, "b n"], theta: float) -> Float[Array, "b n h c"]:
    """Rotates the pairs (i, i + c/2) of every head by position * theta^(-2i/c), angles in f32 (Su et al. 2021)."""
    half = x.shape[-1] // 2
    frequency = jnp.float32(theta) ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequency.reshape(1, 1, 1, half)
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class LlamaLayer(nnx.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x)); no biases."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        c = self.config = config
        head = c.width // c.heads
        dense = partial(linear, bias=False, rngs=rngs)
        self.attention_norm = RMSNorm(c.width, eps=c.norm_eps)
        self.query = dense(c.width, c.heads * head)
        self.key = dense(c.width, c.key_value_heads * head)
        self.value = dense(c.width, c.key_value_heads * head)
        self.out = dense(c.heads * head, c.width)
        self.mlp_norm = RMSNorm(c.width, eps=c.norm_eps)
        self.gate = dense(c.width, c.mlp_width)
        self.up = dense(c.width, c.mlp_width)
        self.down = dense(c.mlp_width, c.width)

    def __call__(
        self, x: Float[Array, "b n d"], positions: Int[Array, "b n"], mask: Bool[Array, "b 1 n n"]
    ) -> Float[Array, "b n d"]:
        c = self.config
        h = self.attention_norm(x)
        query = rearrange(self.query(h), "b n (h c) -> b n h c", h=c.heads)
        key = rearrange(self.key(h), "b n (h c) -> b n h c", h=c.key_value_heads)
        value = rearrange(self.value(h), "b n (h c) -> b n h c", h=c.key_value_heads)
        query, key = rotary(query, positions, c.rope_theta), rotary(key, positions, c.rope_theta)
        # Query heads are grouped by key-value head: head i reads key-value head i // (heads / key_value_heads).
        attended = jax.nn.dot_product_attention(query, key, value, mask=mask)
        x = x + self.out(rearrange(attended, "b n h c -> b n (h c)"))
        h = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(h)) * self.up(h))


class Llama(nnx.Module):
    """Token embeddings -> one hidden state."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        self.tokens = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (c.vocab_size, c.width)))
        self.layers = stack_layers(lambda rngs: LlamaLayer(c, rngs), c.depth, rngs)
        self.final_norm = RMSNorm(c.width, eps=c.norm_eps)

    def embed(self, ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """Embeddings of token ids."""
        return lookup(self.tokens[...], ids)

    def __call__(
        self, embeddings: Float[Array, "b n d"], attention_mask: Bool[Array, "b n"], skip: int = 0
    ) -> Float[Array, "b n d"]:
        """The hidden state `skip` layers before the end, `hidden_states[-(skip + 1)]` in transformers' counting.

        With `skip` 0 it is the state after the final norm (transformers puts the normalised state last in its list,
        Magic-1-For-1 reads that one); with `skip` > 0 the raw residual stream (HunyuanVideo reads skip 2, no norm).
        Padding (mask False) stands on the right; its own states mean nothing.
        """
        c = self.config
        n = embeddings.shape[1]
        positions = jnp.broadcast_to(jnp.arange(n)[None], embeddings.shape[:2])
        causal = jnp.tril(jnp.ones((n, n), bool))[None, None]
        mask = causal & attention_mask[:, None, None, :]
        step = lambda layer, x: layer(x, positions, mask)  # noqa: E731
        x = run_layers(self.layers, step, embeddings, c.depth, c.depth - skip)
        return self.final_norm(x) if skip == 0 else x
