"""Full attention behind one switch.

Sequences are `[b n k d]` (k heads of dimension d). Padding is always at the end of the keys and told by their number,
which every kernel understands; no dense mask is ever made.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from mi_jax.errors import InputError
from mi_jax.mesh import platform

Implementation = Literal["auto", "xla", "cudnn", "splash", "tokamax"]

QUERY_CHUNK = 192
"""Most queries per step of the chunked form on a CPU: their logits stay in cache, and memory is constant in their
number."""
ACCELERATOR_QUERY_CHUNK = 1024
"""The same elsewhere, where a step must keep the whole chip busy."""


def attention(
    q: Float[Array, "b n k d"],
    k: Float[Array, "b m k d"],
    v: Float[Array, "b m k d"],
    *,
    length: Int[Array, "b"] | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "b n k d"]:
    """Softmax attention of all queries to the first `length` keys of their example (all keys if None).

    `auto` is cuDNN's flash attention for 16-bit inputs of a head dim that 8 divides on NVIDIA, splash attention on
    TPUs, else the query-chunked XLA form. `tokamax` is whichever of Tokamax's kernels serves the device
    (github.com/openxla/tokamax, the extra `tokamax`); it gives no denominators, so that where those are asked for (a
    ring over devices) the XLA form stands in. An example whose length is 0 gets finite, meaningless output. Softmax
    statistics are f32.
    """
    chosen = _chosen(implementation, q)
    if chosen == "splash":
        return _splash().splash_attention(q, k, v, _length(length, k))
    if chosen == "cudnn":
        return _cudnn(q, k, v, length)
    if chosen == "tokamax":
        return _tokamax(q, k, v, length)
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
        return _cudnn(q, k, v, length, with_lse=True)
    return _forward(q, k, v, length)


def attention_gradients(
    q: Float[Array, "b n k d"],
    k: Float[Array, "b m k d"],
    v: Float[Array, "b m k d"],
    g: Float[Array, "b n k d"],
    lse: Float[Array, "b k n"],
    delta: Float[Array, "b k n"],
    *,
    length: Int[Array, "b"] | None,
    implementation: Implementation = "auto",
) -> tuple[Float[Array, "b n k d"], Float[Array, "b m k d"], Float[Array, "b m k d"]]:
    """What these keys contribute to the gradients of attention over them and others; f32, splash's in the inputs'.

    lse is the denominator over all keys, `g` the gradient of the result over all keys and `delta` the sum of
    `g * result` over d (FlashAttention-2's backward pass, 2307.08691). Query chunks one after the other.
    """
    if _chosen(implementation, q) == "splash":
        return _splash().splash_gradients(q, k, v, g, lse, delta, _length(length, k))
    scale, n = q.shape[-1] ** -0.5, q.shape[1]
    q, k, v, g = (_heads_first(x).astype(jnp.float32) for x in (q * scale, k, v, g))

    def chunk(carry, xs):
        # Keys by queries: so the products that sum over queries, two of five, find their operands as they need them.
        dk, dv = carry
        block, g, lse, delta = xs
        logits = jnp.einsum("bkmd,bknd->bkmn", k, block)
        weights = jnp.exp(_masked(logits, length, axis=2) - lse)
        dv = dv + jnp.einsum("bkmn,bknd->bkmd", weights, g)
        ds = weights * (jnp.einsum("bkmd,bknd->bkmn", v, g) - delta)
        dk = dk + jnp.einsum("bkmn,bknd->bkmd", ds, block)
        return (dk, dv), jnp.einsum("bkmd,bkmn->bkdn", k, ds)

    def columns(x: Array, fill: float = 0.0) -> Array:
        return jnp.swapaxes(_blocks(x[..., None], fill), -1, -2)

    # A padded query has weight exp(-inf) = 0 everywhere.
    (dk, dv), dq = jax.lax.scan(
        chunk, (0.0 * k, 0.0 * v), (_blocks(q), _blocks(g), columns(lse, jnp.inf), columns(delta))
    )
    dq = scale * rearrange(dq, "c b k d n -> b (c n) k d")[:, :n]
    return dq, _tokens_first(dk), _tokens_first(dv)


def _chosen(implementation: Implementation, q: Array) -> Implementation:
    if implementation != "auto":
        return implementation
    if platform() == "tpu":
        return "splash"
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0
    return "cudnn" if platform() == "gpu" and fits else "xla"


def _splash():
    """`mi_jax.models.splash`: Pallas and its kernels take half a second to import, and most never use them."""
    from mi_jax.models import splash

    return splash


def _cudnn(q: Array, k: Array, v: Array, length: Array | None, with_lse: bool = False) -> Any:
    """cuDNN's flash attention, with what JAX and it do not take: sequences of odd length and queries without a key.

    These are given the first key, which is padding but finite.
    """
    n, m = q.shape[1], k.shape[1]
    some = None if length is None else jnp.maximum(length, 1)
    if m % 2:
        some = jnp.full(k.shape[:1], m, jnp.int32) if some is None else some
        k, v = _even(k), _even(v)
    result = jax.nn.dot_product_attention(
        _even(q), k, v, key_value_seq_lengths=some, implementation="cudnn", return_residual=with_lse
    )
    if not with_lse:
        return result[:, :n]
    out, lse = result
    lse = jnp.moveaxis(lse[:, :n].astype(jnp.float32), 1, 2)
    return out[:, :n], jnp.where((length == 0)[:, None, None], jnp.finfo(jnp.float32).min, lse)


def _tokamax(q: Array, k: Array, v: Array, length: Array | None) -> Array:
    try:
        import tokamax
    except ModuleNotFoundError as missing:
        raise InputError("attention tokamax: pip install 'mi-jax[tokamax]', on Python 3.12 or newer") from missing
    return tokamax.dot_product_attention(q, k, v, key_value_seq_lengths=length)


def _even(x: Array) -> Array:
    """[b n k d] with a row of zeros more where n is odd."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))


def _length(length: Array | None, k: Array) -> Array:
    return jnp.full(k.shape[:1], k.shape[1], jnp.int32) if length is None else length


def _query_chunk() -> int:
    return QUERY_CHUNK if platform() == "cpu" else ACCELERATOR_QUERY_CHUNK


@jax.custom_vjp
def _chunked(q: Array, k: Array, v: Array, length: Array | None) -> Array:
    return _forward(q, k, v, length)[0]


def _chunked_forward(q: Array, k: Array, v: Array, length: Array | None):
    out, lse = _forward(q, k, v, length)
    return out, (q, k, v, length, out, lse)


def _chunked_backward(saved, g: Array):
    """Each chunk's logits are computed again, its weights are read off the denominators."""
    q, k, v, length, out, lse = saved
    delta = jnp.einsum("bnkd,bnkd->bkn", g.astype(jnp.float32), out.astype(jnp.float32))
    gradients = attention_gradients(q, k, v, g, lse, delta, length=length, implementation="xla")
    return *(made.astype(x.dtype) for made, x in zip(gradients, (q, k, v))), None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _forward(q: Array, k: Array, v: Array, length: Array | None) -> tuple[Array, Array]:
    """The result [b n k d] and the logarithm of its denominators [b k n], query chunks one after the other."""
    n = q.shape[1]
    q, k, v = map(_heads_first, (q, k, v))

    def chunk(block: Array) -> tuple[Array, Array]:
        logits = _logits(block, k, length)
        peak = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - peak)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        # Divided after the product: the result is smaller than the weights.
        out = jnp.einsum("bknm,bkmd->bknd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
        return out.astype(v.dtype), peak + jnp.log(total)

    out, lse = chunk(q) if n <= _query_chunk() else (_joined(x, n) for x in jax.lax.map(chunk, _blocks(q)))
    return _tokens_first(out), lse[..., 0]


def _heads_first(x: Array) -> Array:
    """Once, before the loop: a product whose batch axes do not come first is transposed in every turn of it."""
    return rearrange(x, "b n k d -> b k n d")


def _tokens_first(x: Array) -> Array:
    return rearrange(x, "b k n d -> b n k d")


def _blocks(x: Array, fill: float = 0.0) -> Array:
    """[b k n d] in chunks of at most `_query_chunk()` queries, [c b k n/c d].

    Equal shares: 400 rows are 4 x 100, not 3 x 128 and a rest that is mostly padding.
    """
    n = x.shape[2]
    chunks = -(-n // _query_chunk())
    size = -(-n // chunks)
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, chunks * size - n), (0, 0)), constant_values=fill)
    return rearrange(padded, "b k (c n) d -> c b k n d", c=chunks)


def _joined(blocks: Array, n: int) -> Array:
    return rearrange(blocks, "c b k n d -> b k (c n) d")[:, :, :n]


def _logits(q: Array, k: Array, length: Array | None) -> Array:
    logits = jnp.einsum("bknd,bkmd->bknm", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    return _masked(logits, length, axis=3)


def _masked(logits: Array, length: Array | None, axis: int) -> Array:
    """Logits with the most negative number at the keys, along `axis`, that are padding."""
    if length is None:
        return logits
    keys = jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis)
    return jnp.where(keys < length[:, None, None, None], logits, jnp.finfo(jnp.float32).min)
