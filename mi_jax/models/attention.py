"""Full attention behind one switch.

Sequences are `[b n k d]` (k heads of dimension d). Padding is always at the end of the keys and told by their number,
which every kernel understands; no dense mask is ever made.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from mi_jax.mesh import platform

Implementation = Literal["auto", "xla", "cudnn", "splash"]

QUERY_CHUNK = 128
"""Most queries per step of the chunked form: their logits stay in cache, and memory is constant in their number."""


def attention(
    q: Float[Array, "b n k d"],
    k: Float[Array, "b m k d"],
    v: Float[Array, "b m k d"],
    *,
    length: Int[Array, "b"] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "b n k d"]:
    """Softmax attention of all queries to the first `length` keys of their example (all keys if None).

    `auto` is cuDNN's flash attention for 16-bit inputs on NVIDIA, splash attention on TPUs, else the query-chunked XLA
    form. An example whose length is 0 gets finite, meaningless output. Softmax statistics are f32.
    """
    chosen = _chosen(implementation, q)
    if chosen == "splash":
        return _splash().splash_attention(q, k, v, _length(length, k))
    if chosen == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=length, implementation="cudnn")
    return _chunked(q, k, v, length)


def attention_with_lse(
    q: Float[Array, "b n k d"],
    k: Float[Array, "b m k d"],
    v: Float[Array, "b m k d"],
    *,
    length: Int[Array, "b"],
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "b n k d"], Float[Array, "b k n"]]:
    """Attention and the logarithm of each query's softmax denominator (f32), by which parts over other keys add up.

    Not to be differentiated: fused kernels drop what flows back through the second result. `attention_gradients` is
    the backward pass.
    """
    chosen = _chosen(implementation, q)
    if chosen == "splash":
        return _splash().splash_attention_with_lse(q, k, v, length)
    if chosen == "cudnn":
        out, lse = jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=length, implementation="cudnn", return_residual=True
        )
        return out, jnp.moveaxis(lse.astype(jnp.float32), 1, 2)

    def chunk(block: Array) -> tuple[Array, Array]:
        logits = _logits(block, k, length)
        lse = jax.nn.logsumexp(logits, axis=-1)
        weights = jnp.exp(logits - lse[..., None]).astype(v.dtype)
        return jnp.einsum("bknm,bmkd->bnkd", weights, v), lse

    out, lse = jax.lax.map(chunk, _blocks(q))
    return _joined(out, q.shape[1]), rearrange(lse, "c b k n -> b k (c n)")[..., : q.shape[1]]


def attention_gradients(
    q: Float[Array, "b n k d"],
    k: Float[Array, "b m k d"],
    v: Float[Array, "b m k d"],
    g: Float[Array, "b n k d"],
    lse: Float[Array, "b k n"],
    delta: Float[Array, "b k n"],
    *,
    length: Int[Array, "b"],
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "b n k d"], Float[Array, "b m k d"], Float[Array, "b m k d"]]:
    """What these keys contribute to the gradients of attention over them and others; f32, splash's in the inputs'.

    lse is the denominator over all keys, `g` the gradient of the result over all keys and `delta` the sum of
    `g * result` over d (FlashAttention-2's backward pass, 2307.08691). Query chunks one after the other.
    """
    if _chosen(implementation, q) == "splash":
        return _splash().splash_gradients(q, k, v, g, lse, delta, length)
    scale = q.shape[-1] ** -0.5

    def chunk(carry, xs):
        dk, dv = carry
        block, g, lse, delta = xs
        weights = jnp.exp(_logits(block, k, length) - lse[..., None])
        dv = dv + jnp.einsum("bknm,bnkd->bmkd", weights, g)
        ds = weights * (jnp.einsum("bnkd,bmkd->bknm", g, v.astype(jnp.float32)) - delta[..., None]) * scale
        dk = dk + jnp.einsum("bknm,bnkd->bmkd", ds, block.astype(jnp.float32))
        return (dk, dv), jnp.einsum("bknm,bmkd->bnkd", ds, k.astype(jnp.float32))

    rows = lambda x, fill: rearrange(_blocks(rearrange(x, "b k n -> b n k 1"), fill), "c b n k 1 -> c b k n")  # noqa: E731
    # A padded query has weight exp(-inf) = 0 everywhere.
    xs = (_blocks(q), _blocks(g), rows(lse, jnp.inf), rows(delta, 0.0))
    zero = (0.0 * k.astype(jnp.float32), 0.0 * v.astype(jnp.float32))
    (dk, dv), dq = jax.lax.scan(chunk, zero, xs)
    return _joined(dq, q.shape[1]), dk, dv


def _chosen(implementation: Implementation, q: Array) -> Implementation:
    if implementation != "auto":
        return implementation
    if platform() == "tpu":
        return "splash"
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return "cudnn" if platform() == "gpu" and half else "xla"


def _splash():
    """`mi_jax.models.splash`: Pallas and its kernels take half a second to import, and most never use them."""
    from mi_jax.models import splash

    return splash


def _length(length: Array | None, k: Array) -> Array:
    return jnp.full(k.shape[:1], k.shape[1], jnp.int32) if length is None else length


def _chunked(q: Array, k: Array, v: Array, length: Array | None) -> Array:
    if q.shape[1] <= QUERY_CHUNK:
        return _plain(q, k, v, length)
    # The checkpoint drops each chunk's logits and recomputes them in the backward pass.
    out = jax.lax.map(jax.checkpoint(lambda block: _plain(block, k, v, length)), _blocks(q))
    return _joined(out, q.shape[1])


def _blocks(x: Array, fill: float = 0.0) -> Array:
    """[b n k d] in chunks of at most QUERY_CHUNK rows, [c b n/c k d].

    Equal shares: 400 rows are 4 x 100, not 3 x 128 and a rest that is mostly padding.
    """
    n = x.shape[1]
    chunks = -(-n // QUERY_CHUNK)
    size = -(-n // chunks)
    padded = jnp.pad(x, ((0, 0), (0, chunks * size - n), (0, 0), (0, 0)), constant_values=fill)
    return rearrange(padded, "b (c n) k d -> c b n k d", c=chunks)


def _joined(blocks: Array, n: int) -> Array:
    return rearrange(blocks, "c b n k d -> b (c n) k d")[:, :n]


def _logits(q: Array, k: Array, length: Array | None) -> Array:
    logits = jnp.einsum("bnkd,bmkd->bknm", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if length is None:
        return logits
    valid = jnp.arange(k.shape[1])[None, :] < length[:, None]
    return jnp.where(valid[:, None, None, :], logits, jnp.finfo(jnp.float32).min)


def _plain(q: Array, k: Array, v: Array, length: Array | None) -> Array:
    weights = jax.nn.softmax(_logits(q, k, length), axis=-1).astype(v.dtype)
    return jnp.einsum("bknm,bmkd->bnkd", weights, v)
