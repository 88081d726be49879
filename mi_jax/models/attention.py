"""Full attention behind one switch.

Sequences are `[b n k d]` (k heads of dimension d). Padding is always at the end of the keys and told by their number,
which every kernel understands; no dense mask is ever made.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

Implementation = Literal["auto", "xla", "cudnn"]

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

    `auto` is cuDNN's flash attention for 16-bit inputs on NVIDIA, else the query-chunked XLA form. An example whose
    length is 0 gets finite, meaningless output. Softmax statistics are f32.
    """
    if implementation == "auto":
        half = q.dtype in (jnp.bfloat16, jnp.float16)
        implementation = "cudnn" if jax.default_backend() == "gpu" and half else "xla"
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=length, implementation="cudnn")
    return _chunked(q, k, v, length)


def _chunked(q: Array, k: Array, v: Array, length: Array | None) -> Array:
    n = q.shape[1]
    if n <= QUERY_CHUNK:
        return _plain(q, k, v, length)
    chunks = -(-n // QUERY_CHUNK)
    size = -(-n // chunks)  # equal shares: 400 queries are 4 x 100, not 3 x 128 and a rest that is mostly padding
    padded = jnp.pad(q, ((0, 0), (0, chunks * size - n), (0, 0), (0, 0)))
    blocks = rearrange(padded, "b (c n) k d -> c b n k d", c=chunks)
    # The checkpoint drops each chunk's logits and recomputes them in the backward pass.
    out = jax.lax.map(jax.checkpoint(lambda block: _plain(block, k, v, length)), blocks)
    return rearrange(out, "c b n k d -> b (c n) k d")[:, :n]


def _plain(q: Array, k: Array, v: Array, length: Array | None) -> Array:
    logits = jnp.einsum("bnkd,bmkd->bknm", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if length is not None:
        valid = jnp.arange(k.shape[1])[None, :] < length[:, None]
        logits = jnp.where(valid[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bknm,bmkd->bnkd", weights, v)
