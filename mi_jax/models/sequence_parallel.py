"""Full attention over a sequence that is spread over the mesh's `seq` axis: Ulysses inside, a ring outside (USP).

The `seq` axis of S devices is read as ring x ulysses. In a group of `ulysses` neighbours every device gives away its
tokens of some heads for the other devices' tokens of its own (one all-to-all, DeepSpeed-Ulysses, 2309.14509); between
groups, keys and values travel around a ring while each device folds what passes into its softmax (Ring Attention,
2310.01889; the split of both is USP, 2405.07719). Queries never move further than their group.

Padding: the video's is at its end and known when traced, the text's differs between examples. Every chunk of keys is
packed so that its valid keys come first, which is what attention kernels understand; no dense mask is made.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mi_jax.errors import InputError
from mi_jax.mesh import axis_size, batch_axis, per_device
from mi_jax.models.attention import Implementation, attention, attention_gradients, attention_with_lse

AXIS = "seq"


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How the axis is read; static under `jax.jit`. video: valid video tokens of the whole sequence."""

    ring: int
    ulysses: int
    video: int
    implementation: Implementation


def ulysses_degree(devices: int, heads: int, wanted: int | None = None) -> int:
    """How many of the axis's `devices` exchange heads; the ring has the rest. By default the most that heads allow.

    Raises:
      InputError: `wanted` divides the devices or the heads not; names the degrees that do.
    """
    working = [n for n in range(1, devices + 1) if devices % n == 0 and heads % n == 0]
    if wanted is None:
        return working[-1]
    if wanted not in working:
        raise InputError(
            f"{heads} heads on {devices} devices: an Ulysses degree of {wanted} does not divide both; "
            f"possible are {', '.join(map(str, working))}"
        )
    return wanted


def joint_attention(
    video: tuple[Float[Array, "b n k d"], ...],
    text: tuple[Float[Array, "b m k d"], ...],
    text_length: Int[Array, "b"],
    *,
    video_length: int | None = None,
    implementation: Implementation = "auto",
    ulysses: int | None = None,
) -> tuple[Float[Array, "b n k d"], Float[Array, "b m k d"]]:
    """Attention of [video, text] to the first `video_length` video tokens and the first `text_length` text tokens.

    Each stream is its queries, keys and values.

    On a mesh whose `seq` axis has more than one device both streams are spread over it (`P("data", "seq")`, or each
    device's share inside `mesh.per_device`), padded to a multiple of its size; the result equals that on one device,
    gradients included. What comes out at padding is finite and means nothing. `video_length` counts the whole
    sequence and is needed inside `per_device`.
    """
    n, heads = video[0].shape[1], video[0].shape[2]
    video_length = n if video_length is None else video_length
    mesh = jax.sharding.get_abstract_mesh()
    devices = axis_size(AXIS)
    if devices == 1:
        # Padding of the video cannot stand before the text here: there is none on one device.
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(video, text))
        out = attention(q, k, v, length=n + text_length, implementation=implementation)
        return out[:, :n], out[:, n:]
    degree = ulysses_degree(devices, heads, ulysses)
    run = partial(_local, _Plan(devices // degree, degree, video_length, implementation))
    if mesh.axis_types[mesh.axis_names.index(AXIS)] is not AxisType.Manual:
        run = per_device(run, (P(batch_axis(video[0]), AXIS),) * 2)
    return run(video, text, text_length)


def local_shard(x: Array, axis: int = 1) -> Array:
    """A device's own part of an axis that the whole `seq` axis has, padded with zeros where it does not divide.

    For code inside `mesh.per_device`.
    """
    devices = axis_size(AXIS)
    if devices == 1:
        return x
    share = -(-x.shape[axis] // devices)
    widths = [(0, devices * share - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    return jax.lax.dynamic_slice_in_dim(jnp.pad(x, widths), share * jax.lax.axis_index(AXIS), share, axis)


def _local(plan: _Plan, video: tuple, text: tuple, text_length: Array) -> tuple[Array, Array]:
    """What one device does. Arrays are its own share."""
    nv, nt = video[0].shape[1], text[0].shape[1]
    q, k, v = (_to_heads(plan, jnp.concatenate(pair, axis=1)) for pair in zip(video, text))
    chunk = jax.lax.axis_index(AXIS) // plan.ulysses
    chunks = jnp.arange(plan.ring)
    valid_video = jnp.clip(plan.video - chunks * plan.ulysses * nv, 0, plan.ulysses * nv)
    valid_text = jnp.clip(text_length[None] - (chunks * plan.ulysses * nt)[:, None], 0, plan.ulysses * nt)
    k, v = (_pack(x, plan.ulysses, nv, valid_video[chunk]) for x in (k, v))
    lengths = valid_video[:, None] + valid_text
    if plan.ring == 1:
        out = attention(q, k, v, length=lengths[0], implementation=plan.implementation)
    else:
        out = _ring(plan, q, k, v, lengths)
    out = _to_tokens(plan, out)
    return out[:, :nv], out[:, nv:]


def _groups(plan: _Plan) -> list[list[int]] | None:
    if plan.ring == 1:
        return None
    return [[g * plan.ulysses + i for i in range(plan.ulysses)] for g in range(plan.ring)]


def _to_heads(plan: _Plan, x: Array) -> Array:
    """[b n k d] with all heads to [b ulysses*n k/ulysses d], the tokens of the group in the order of its devices."""
    if plan.ulysses == 1:
        return x
    return jax.lax.all_to_all(x, AXIS, 2, 1, axis_index_groups=_groups(plan), tiled=True)


def _to_tokens(plan: _Plan, x: Array) -> Array:
    """The inverse of `_to_heads`."""
    if plan.ulysses == 1:
        return x
    return jax.lax.all_to_all(x, AXIS, 1, 2, axis_index_groups=_groups(plan), tiled=True)


def _pack(x: Array, group: int, nv: int, valid_video: Array) -> Array:
    """[video, text] of each device of the group to valid video, text, rest."""
    b, total, k, d = x.shape
    parts = x.reshape(b, group, total // group, k, d)
    video = parts[:, :, :nv].reshape(b, -1, k, d)
    text = parts[:, :, nv:].reshape(b, -1, k, d)
    room = jnp.concatenate([video, jnp.zeros_like(text)], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(room, text, valid_video, axis=1)


# --- the ring ------------------------------------------------------------------------------------------------------


def _pass_on(plan: _Plan, *arrays: Array) -> tuple[Array, ...]:
    """Every group's arrays to the same place in the next group."""
    devices = plan.ring * plan.ulysses
    steps = [(i, (i + plan.ulysses) % devices) for i in range(devices)]
    return tuple(jax.lax.ppermute(x, AXIS, steps) for x in arrays)


def _chunk_length(plan: _Plan, lengths: Array, step: Array | int) -> Array:
    """Valid keys [b] of the chunk that a device holds after `step` passes."""
    own = jax.lax.axis_index(AXIS) // plan.ulysses
    return lengths[(own - step) % plan.ring]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(plan: _Plan, q: Array, k: Array, v: Array, lengths: Array) -> Array:
    return _ring_forward(plan, q, k, v, lengths)[0]


def _ring_forward(plan: _Plan, q: Array, k: Array, v: Array, lengths: Array):
    def attend(k, v, step):
        length = _chunk_length(plan, lengths, step)
        out, lse = attention_with_lse(q, k, v, length=length, implementation=plan.implementation)
        some = (length > 0)[:, None, None]  # what a kernel makes of no keys at all is not even finite
        return jnp.where(some[..., None], out.astype(jnp.float32), 0.0), jnp.where(some, lse, -jnp.inf)

    def fold(carry, step):
        out, lse, k, v = carry
        k, v = _pass_on(plan, k, v)
        new_out, new_lse = attend(k, v, step)
        total = jnp.logaddexp(lse, new_lse)
        safe = jnp.where(jnp.isfinite(total), total, 0.0)
        old, new = (jnp.moveaxis(jnp.exp(part - safe), 1, 2)[..., None] for part in (lse, new_lse))
        return (old * out + new * new_out, total, k, v), None

    start = (*attend(k, v, 0), k, v)
    out, lse, _, _ = jax.lax.scan(fold, start, jnp.arange(1, plan.ring))[0]
    return out.astype(q.dtype), (q, k, v, lengths, out, lse)


def _ring_backward(plan: _Plan, saved, g: Array):
    """The whole sequence's softmax, chunk by chunk: autodiff of the forward pass would lose what flows through the
    statistics of fused kernels."""
    q, k, v, lengths, out, lse = saved
    g = g.astype(jnp.float32)
    delta = jnp.einsum("bnkd,bnkd->bkn", g, out)

    def gradients(k, v, step):
        parts = attention_gradients(
            q, k, v, g, lse, delta, length=_chunk_length(plan, lengths, step), implementation=plan.implementation
        )
        return tuple(part.astype(jnp.float32) for part in parts)

    def fold(carry, step):
        dq, dk, dv, k, v = carry
        dk, dv, k, v = _pass_on(plan, dk, dv, k, v)
        more_q, more_k, more_v = gradients(k, v, step)
        return (dq + more_q, dk + more_k, dv + more_v, k, v), None

    start = (*gradients(k, v, 0), k, v)
    dq, dk, dv, _, _ = jax.lax.scan(fold, start, jnp.arange(1, plan.ring))[0]
    dk, dv = _pass_on(plan, dk, dv)  # home
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring.defvjp(_ring_forward, _ring_backward)
