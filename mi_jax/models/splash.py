"""JAX's splash attention, a flash kernel for TPUs, for keys whose padding is told by their number.

Forward and backward kernels are called one by one, so that a ring over devices can fold its own statistics into them:
the public `make_splash_mha` joins them, and its outputs say nothing of the devices they differ between, which
`jax.shard_map` asks for.
On other machines Pallas interprets the kernels: exact and slow, for tests.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from mi_jax.mesh import platform

BLOCK = 1024
"""Queries and keys of a block in VMEM; sequences are padded to a multiple of it, short ones to one of `LANES`."""
COMPUTE_BLOCK = 512
LANES = 128


@jax.custom_vjp
def splash_attention(
    q: Float[Array, "b n k d"], k: Float[Array, "b m k d"], v: Float[Array, "b m k d"], length: Int[Array, "b"]
) -> Float[Array, "b n k d"]:
    """`attention` of q to the first `length` keys by splash kernels, differentiable in q, k and v."""
    return splash_attention_with_lse(q, k, v, length)[0]


def _forward(q: Array, k: Array, v: Array, length: Array):
    out, lse = splash_attention_with_lse(q, k, v, length)
    return out, (q, k, v, length, out, lse)


def _backward(saved: tuple, g: Array):
    q, k, v, length, out, lse = saved
    delta = jnp.einsum("bnkd,bnkd->bkn", g.astype(jnp.float32), out.astype(jnp.float32))
    return *splash_gradients(q, k, v, g, lse, delta, length), None


splash_attention.defvjp(_forward, _backward)


def splash_attention_with_lse(
    q: Float[Array, "b n k d"], k: Float[Array, "b m k d"], v: Float[Array, "b m k d"], length: Int[Array, "b"]
) -> tuple[Float[Array, "b n k d"], Float[Array, "b k n"]]:
    """Attention and the logarithm of each query's softmax denominator (f32)."""
    n, d = q.shape[1], q.shape[3]
    sizes = _blocks(n, k.shape[1])
    kernel, segments = _kernel(q, k, sizes), _segments(sizes, n, k.shape[1], length)

    def run(q, k, v, q_ids, kv_ids):
        return kernels._splash_attention_forward(
            kernel.fwd_mask_info, q, k, v, kernels.SegmentIds(q_ids, kv_ids), None, save_residuals=True,
            residual_checkpoint_name=None, **_options(sizes),
        )  # fmt: skip

    arrays = (_heads_first(q * d**-0.5, sizes.block_q), *(_heads_first(x, sizes.block_kv) for x in (k, v)))
    with jax._src.config._check_vma(False):
        out, (lse,) = jax.vmap(run)(*arrays, *segments)
    out, lse = _varying((out, lse), q)
    return rearrange(out, "b k n d -> b n k d")[:, :n, :, :d], lse[:, :, :n]


def splash_gradients(
    q: Float[Array, "b n k d"],
    k: Float[Array, "b m k d"],
    v: Float[Array, "b m k d"],
    g: Float[Array, "b n k d"],
    lse: Float[Array, "b k n"],
    delta: Float[Array, "b k n"],
    length: Int[Array, "b"],
) -> tuple[Float[Array, "b n k d"], Float[Array, "b m k d"], Float[Array, "b m k d"]]:
    """`attention_gradients` by splash's two backward kernels, in the dtypes of q, k and v."""
    n, m, d = q.shape[1], k.shape[1], q.shape[3]
    sizes = _blocks(n, m)
    kernel, segments = _kernel(q, k, sizes), _segments(sizes, n, m, length)
    options = {name: value for name, value in _options(sizes).items() if name != "block_sizes"}
    options |= {name: getattr(sizes, name) for name in ("q_layout", "k_layout", "v_layout")}

    def run(q, k, v, g, lse, delta, q_ids, kv_ids):
        given = (q, k, v, kernels.SegmentIds(q_ids, kv_ids), None, lse, g, delta)
        _, dk, dv = kernels._splash_attention_bwd_dkv(
            *given, bq=sizes.block_q_dkv, bkv=sizes.block_kv_dkv, bkv_compute=sizes.block_kv_dkv_compute,
            mask_info=kernel.dkv_mask_info, use_fused_bwd_kernel=False, **options,
        )  # fmt: skip
        dq = kernels._splash_attention_bwd_dq(
            *given, bq=sizes.block_q_dq, bkv=sizes.block_kv_dq, mask_info=kernel.dq_mask_info, **options
        )
        return dq, dk, dv

    scale = d**-0.5
    arrays = (_heads_first(q * scale, sizes.block_q), *(_heads_first(x, sizes.block_kv) for x in (k, v)))
    arrays += (_heads_first(g.astype(q.dtype), sizes.block_q),)
    rows = ((0, 0), (0, 0), (0, -n % sizes.block_q))
    # A padded query has weight exp(-inf) = 0 everywhere: the largest number stands in for infinity.
    arrays += (jnp.pad(lse, rows, constant_values=-kernels.DEFAULT_MASK_VALUE), jnp.pad(delta, rows))
    with jax._src.config._check_vma(False):
        gradients = jax.vmap(run)(*arrays, *segments)
    dq, dk, dv = (rearrange(x, "b k n d -> b n k d")[..., :d] for x in _varying(gradients, q))
    return dq[:, :n] * scale, dk[:, :m], dv[:, :m]


def _blocks(n: int, m: int) -> kernels.BlockSizes:
    rows, columns = (min(BLOCK, -(-size // LANES) * LANES) for size in (n, m))
    compute = COMPUTE_BLOCK if columns % COMPUTE_BLOCK == 0 else columns
    return kernels.BlockSizes(
        block_q=rows, block_kv=columns, block_kv_compute=compute,
        block_q_dkv=rows, block_kv_dkv=columns, block_kv_dkv_compute=compute, block_q_dq=rows, block_kv_dq=columns,
    )  # fmt: skip


def _kernel(q: Array, k: Array, sizes: kernels.BlockSizes) -> kernels.SplashAttentionKernel:
    """For masks of nothing: all padding is in the segments."""
    n, m = q.shape[1] + -q.shape[1] % sizes.block_q, k.shape[1] + -k.shape[1] % sizes.block_kv
    mask = masks.MultiHeadMask([masks.FullMask((n, m))] * q.shape[2])
    return kernels.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)


def _options(sizes: kernels.BlockSizes) -> dict:
    return {
        "mask_value": kernels.DEFAULT_MASK_VALUE,
        "is_mqa": False,
        "block_sizes": sizes,
        "attn_logits_soft_cap": None,
        "mask_function": None,
        "interpret": platform() == "cpu",
    }


def _segments(sizes: kernels.BlockSizes, n: int, m: int, length: Array) -> tuple[Array, Array]:
    """Queries are all of segment 0, keys up to `length`, the others of 1."""
    queries = jnp.zeros((length.shape[0], n + -n % sizes.block_q), jnp.int32)
    keys = jnp.arange(m + -m % sizes.block_kv)[None] >= length[:, None]
    return queries, keys.astype(jnp.int32)


def _heads_first(x: Float[Array, "b n k d"], block: int) -> Float[Array, "b k padded lanes"]:
    """Padded to whole blocks, and heads to whole lanes."""
    n, d = x.shape[1], x.shape[3]
    return rearrange(jnp.pad(x, ((0, 0), (0, -n % block), (0, 0), (0, -d % LANES))), "b n k d -> b k n d")


def _varying(tree, like: Array):
    """Inside `mesh.per_device`: marked as different between the devices that `like` differs between."""
    axes = tuple(jax.typeof(like).mat.varying)
    return jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), tree) if axes else tree
