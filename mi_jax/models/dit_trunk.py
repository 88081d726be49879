"""The denoiser's depth: a scan over the bodies of one kind, with taps, and what it keeps for the backward pass."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from mi_jax.mesh import batch_axis, gather_parameters, per_device, vary_like
from mi_jax.models.dit_blocks import AudioAttention, Body, Context, DoubleBlock, SingleBlock
from mi_jax.models.dit_config import DiTConfig, Kind, Remat
from mi_jax.models.sequence_parallel import AXIS


def scan_bodies(
    config: DiTConfig,
    kind: Kind,
    bodies: Body,
    streams: tuple[Array, Array],
    context: Context,
    taps: tuple[int, ...],
) -> tuple[tuple[Array, Array], Array | None]:
    """All bodies of one kind: both streams, and the video's after each block in `taps` [taps b n d]."""
    tokens, count = P(batch_axis(streams[0]), AXIS), getattr(config, f"{kind}_per_body")
    listen = context.audio is not None and config.hears(kind)

    def run_body(streams: tuple[Array, Array], body: Body):
        hidden = []
        for i in range(count):
            # Taken out before it is gathered: one block's whole parameters at a time, and no copy of them.
            block = gather_parameters(jax.tree.map(lambda leaf, i=i: leaf[i], body.blocks))
            streams = per_device(_run_block, (tokens, tokens))(block, *streams, context)
            hidden.append(streams[0])
        if listen:
            audio = gather_parameters(body.audio)
            streams = per_device(_run_audio, tokens)(audio, streams[0], context), streams[1]
        return streams, hidden if taps else None

    # Where a block's hidden states are kept among those of the taps; past their end: nowhere.
    slots = len(taps) + np.tile(np.arange(count), (config.bodies(kind), 1))
    for slot, number in enumerate(taps):
        slots[divmod(number, count)] = slot
    run_body = rematerialised(run_body, config.remat)

    def step(carry, body_and_slots):
        (streams, kept), (body, slots) = carry, body_and_slots
        streams, hidden = run_body(streams, body)
        if taps:  # outside what is rematerialised, which would save `kept` for every body
            keep = lambda kept, hidden, slots: kept.at[slots].set(jnp.stack(hidden), mode="drop", unique_indices=True)  # noqa: E731
            kept = per_device(keep, P(None, *tokens))(kept, hidden, slots)
        return (streams, kept), None

    kept = jnp.stack([jnp.zeros_like(streams[0])] * len(taps)) if taps else None
    return jax.lax.scan(step, (streams, kept), (bodies, slots if taps else None), unroll=config.unroll)[0]


def _run_block(block: DoubleBlock | SingleBlock, video: Array, text: Array, context: Context) -> tuple[Array, Array]:
    return block(video, text, _as_tokens_vary(context, video))


def _run_audio(audio: AudioAttention, video: Array, context: Context) -> Array:
    context, n = _as_tokens_vary(context, video), context.audio_mask.shape[-1]
    heard = audio(video[:, :n], context.audio, context.audio_mask, context.frames)
    return jnp.concatenate([heard, video[:, n:]], axis=1)


def _as_tokens_vary(context: Context, tokens: Array) -> Context:
    """A device's context as one that it could have for itself, as it has its tokens: the gradients of the parameters
    that it meets are then summed over all devices in one go, by scattering the sum to where the parameters lie."""
    return jax.tree.map(lambda x: vary_like(x, tokens), context)


def rematerialised(body: Callable, remat: Remat) -> Callable:
    """A scan's body whose backward pass computes its activations again from the tokens that entered it.

    With "none" it computes only what is cheap again, and gathers parameters again.
    """
    if remat == "none":
        return jax.checkpoint(body, prevent_cse=False, policy=_worth_keeping)
    policy = None
    if remat == "offload":
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["tokens"],
            offload_src="device",
            offload_dst="pinned_host",
        )

    def named(streams, parameters):
        return body(jax.tree.map(lambda tokens: checkpoint_name(tokens, "tokens"), streams), parameters)

    return jax.checkpoint(named, prevent_cse=False, policy=policy)


# fmt: off
_CHEAP = {
    "reshard", "pcast", "pvary", "slice", "squeeze", "reshape", "transpose", "broadcast_in_dim", "concatenate", "pad",
    "split", "convert_element_type", "select_n", "add", "add_any", "sub", "mul", "div", "neg", "max", "integer_pow",
    "square", "rsqrt", "tanh", "logistic", "reduce_sum",
}
# fmt: on


def _worth_keeping(primitive, *_, **__) -> bool:
    """Products and attention; not what moves, gathers or combines them token by token. A block's parameters, taken out
    of their stack and gathered, are of the latter: kept, they would be the whole model once more."""
    return primitive.name not in _CHEAP
