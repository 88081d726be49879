"""The denoiser's small parts: norms, modulation, embeddings and rotary positions. Statistics are always f32."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from mi_jax.mesh import vary_like

zeros_init = nnx.initializers.zeros_init()


def linear(d_in: int, d_out: int, *, rngs: nnx.Rngs, bias: bool = True, init: Callable | None = None) -> nnx.Linear:
    """A dense layer with f32 master weights that computes in the dtype of its (cast) parameters; see `matmul`."""
    return Linear(
        d_in,
        d_out,
        use_bias=bias,
        kernel_init=init or nnx.initializers.xavier_uniform(),
        param_dtype=jnp.float32,
        rngs=rngs,
    )


class Linear(nnx.Linear):
    """`nnx.Linear` with the product of `matmul`, whose bias has its gradient summed in f32 whatever the dtype: over a
    video's tokens a sum in bf16 stops growing.

    down, up: factors of a low-rank change of the kernel, where it has one (`mi_jax.models.lora.adapt`).
    """

    down: nnx.Param | None = None
    up: nnx.Param | None = None

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b e"]:
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((x, self.kernel[...], bias), dtype=self.dtype)
        y = matmul(x, kernel)
        if self.up is not None:
            y = y + matmul(matmul(x, self.down[...].astype(x.dtype)), self.up[...].astype(x.dtype))
        return y if bias is None else add_bias(y, bias)


def add_bias(x: Float[Array, "*b d"], bias: Float[Array, "d"]) -> Float[Array, "*b d"]:
    """`x + bias`; the gradient of the bias is summed in f32."""
    return _add_bias(x, vary_like(bias, x))


@jax.custom_vjp
def _add_bias(x: Array, bias: Array) -> Array:
    return x + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def _add_bias_backward(_, g: Array) -> tuple[Array, Array]:
    return g, jnp.sum(g, axis=tuple(range(g.ndim - 1)), dtype=jnp.float32).astype(g.dtype)


_add_bias.defvjp(lambda x, bias: (_add_bias(x, bias), None), _add_bias_backward)


def matmul(x: Float[Array, "*b d"], kernel: Float[Array, "d e"]) -> Float[Array, "*b e"]:
    """`x @ kernel`, which follows `jax.default_matmul_precision("bfloat16")` on every backend.

    With it, f32 operands are rounded to bf16 and summed in f32, in the backward products too: what a TPU does by
    itself. XLA ignores the setting on CPUs, whose matrix units (AMX) are then left idle.
    """
    low = jax.config.jax_default_matmul_precision == "bfloat16" and x.dtype == jnp.float32
    if low:
        return _rounded_matmul(x, vary_like(kernel, x))
    return _gradient_at_once(jax.lax.dot_general(x, kernel, _contract((x.ndim - 1,), (0,))))


@jax.custom_vjp
def _gradient_at_once(x: Array) -> Array:
    """`x`, whose gradient is computed before it is used: two products need it, each its own way round, and XLA's CPU
    backend would compute it in the transposing copy of each."""
    return x


_gradient_at_once.defvjp(lambda x: (x, None), lambda _, g: (jax.lax.optimization_barrier(g),))


def _contract(of_a: tuple[int, ...], of_b: tuple[int, ...]):
    return (of_a, of_b), ((), ())


def _rounded(a: Array, b: Array, dimensions, out_sharding=None) -> Array:
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32, out_sharding=out_sharding)


@jax.custom_vjp
def _rounded_matmul(x: Array, kernel: Array) -> Array:
    return _rounded(x, kernel, _contract((x.ndim - 1,), (0,)))


def _rounded_matmul_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    lead = tuple(range(x.ndim - 1))
    whole = None if jax.sharding.get_abstract_mesh().empty else jax.typeof(kernel).sharding
    return _rounded(g, kernel, _contract((g.ndim - 1,), (1,))), _rounded(x, g, _contract(lead, lead), whole)


_rounded_matmul.defvjp(lambda x, kernel: (_rounded_matmul(x, kernel), (x, kernel)), _rounded_matmul_backward)


def layer_norm(x: Float[Array, "*b d"], eps: float = 1e-6) -> Float[Array, "*b d"]:
    """Layer norm without affine parameters; returns f32, for the modulation that follows."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + eps)


class LayerNorm(nnx.Module):
    """Layer norm with scale and bias, computed in f32 and returned in the dtype of `x`."""

    def __init__(self, dim: int, *, eps: float = 1e-6):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        lead = (1,) * (x.ndim - 1)
        scale, bias = (p[...].astype(jnp.float32).reshape(*lead, -1) for p in (self.scale, self.bias))
        return (layer_norm(x, self.eps) * scale + bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis with a learned scale (QK-norm), in f32."""

    def __init__(self, dim: int, *, eps: float = 1e-6):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return _rms_norm(x, self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,)), self.eps)


@partial(jax.checkpoint, static_argnums=2)
def _rms_norm(x: Array, scale: Array, eps: float) -> Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


@jax.checkpoint
def modulate(
    x: Float[Array, "b n d"], shift: Float[Array, "b #n d"], scale: Float[Array, "b #n d"]
) -> Float[Array, "b n d"]:
    """`layer_norm(x) * (1 + scale) + shift` in f32, returned in the dtype of `x` (adaptive layer norm)."""
    shift, scale = (per_token(part.astype(jnp.float32), x) for part in (shift, scale))
    return (layer_norm(x) * (1 + scale) + shift).astype(x.dtype)


def per_token(vector: Float[Array, "b #n d"], x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """A vector of each example at every token of `x`; its gradient, the sum over tokens, is a product with ones."""
    if vector.shape[1] == x.shape[1]:
        return vector
    return _per_token(vary_like(vector, x), x.shape[1])


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _per_token(vector: Array, n: int) -> Array:
    return jnp.broadcast_to(vector, (vector.shape[0], n, vector.shape[2]))


def _per_token_backward(n: int, _, g: Array) -> tuple[Array]:
    ones = jnp.ones((g.shape[0], 1, n), g.dtype)
    return (jnp.einsum("bin,bnd->bid", ones, g, preferred_element_type=jnp.float32).astype(g.dtype),)


_per_token.defvjp(lambda vector, n: (_per_token(vector, n), None), _per_token_backward)


class Modulation(nnx.Module):
    """From the conditioning vector to `count` vectors (shifts, scales, gates); zero-initialised, so a block
    starts as identity."""

    def __init__(self, dim: int, count: int, *, rngs: nnx.Rngs):
        self.count = count
        self.linear = linear(dim, count * dim, init=zeros_init, rngs=rngs)

    def __call__(self, vec: Float[Array, "b d"]) -> list[Float[Array, "b 1 d"]]:
        return jnp.split(self.linear(jax.nn.silu(vec))[:, None, :], self.count, axis=-1)


class MLPEmbedder(nnx.Module):
    """Linear, SiLU, Linear: lifts timesteps, pooled text and pooled prompts to the width of the model."""

    def __init__(self, d_in: int, dim: int, *, rngs: nnx.Rngs):
        self.fc1 = linear(d_in, dim, rngs=rngs)
        self.fc2 = linear(dim, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b i"]) -> Float[Array, "b d"]:
        return self.fc2(jax.nn.silu(self.fc1(x)))


class MLP(nnx.Module):
    """The transformer's feed-forward part."""

    def __init__(self, dim: int, hidden: int, activation: Callable, *, rngs: nnx.Rngs):
        self.activation = activation
        self.fc1 = linear(dim, hidden, rngs=rngs)
        self.fc2 = linear(hidden, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.fc2(self.activation(self.fc1(x)))


@jax.checkpoint
def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU in its tanh approximation, HunyuanVideo's."""
    return jax.nn.gelu(x, approximate=True)


def sinusoid(position: Float[Array, "n"], dim: int, max_period: float = 10_000.0) -> Float[Array, "n {dim}"]:
    """Sinusoidal embedding, cosines then sines, f32 (HunyuanVideo's timestep embedding)."""
    half = dim // 2
    # The reference's f32: its exponents, and their exp to the last bit, which NumPy's own f32 exp misses. At position
    # 6000 one bit here is 1e-3 radians there, and weights are used to it.
    exponents = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = jnp.asarray(np.exp(exponents.astype(np.float64)).astype(np.float32))
    angles = position.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def grid_positions(times: Float[Array, "t"], height: int, width: int) -> Float[Array, "n 3"]:
    """Positions (t, h, w) of the tokens of latent frames at `times`, each of height x width tokens, row by row."""
    frames, rows, columns = jnp.meshgrid(
        times, *(jnp.arange(size, dtype=jnp.float32) for size in (height, width)), indexing="ij"
    )
    return jnp.stack([frames.ravel(), rows.ravel(), columns.ravel()], axis=-1)


def rope_table(
    positions: Float[Array, "n 3"], axes: tuple[int, int, int], theta: float
) -> tuple[Float[Array, "n r"], Float[Array, "n r"]]:
    """Rotary (cos, sin) of tokens at (t, h, w), f32, r = sum(axes) / 2.

    Each axis has its own share of the head's dims; the shares are concatenated t, h, w (HunyuanVideo
    `posemb_layers.py`).
    """
    angles = []
    for axis, dim in enumerate(axes):
        frequencies = jnp.asarray(theta ** (-np.arange(0, dim, 2) / dim), jnp.float32)
        angles.append(positions[:, axis, None] * frequencies[None, :])
    angle = jnp.concatenate(angles, axis=-1)
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(
    x: Float[Array, "b n k d"], table: tuple[Float[Array, "n r"], Float[Array, "n r"]]
) -> Float[Array, "b n k d"]:
    """Rotates interleaved pairs of the head dims (x0, x1), (x2, x3), ...; in f32, returned in the dtype of `x`."""
    cos, sin = (part[None, :, None, :] for part in table)
    pairs = rearrange(x.astype(jnp.float32), "b n k (r two) -> b n k r two", two=2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rearrange(rotated, "b n k r two -> b n k (r two)").astype(x.dtype)
