"""Audio cross-attention against PyTorch's attention, one latent frame and speaker at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from reference import relative_error
from tiny_dit import TALKING

from mi_jax.models.dit_blocks import AudioAttention


@pytest.mark.parametrize("shared", [False, True], ids=["frame by frame", "a share of the tokens"])
def test_audio_attention_equals_pytorchs_frame_by_frame(shared):
    """Paper Eq. 2, from the projections on: softmax(q k / sqrt(d)) v of each frame, masked, summed over speakers."""
    b, s, t, a, n = 2, 2, 3, 4, 6
    heads, width = TALKING.heads, TALKING.width
    graph, state = nnx.split(nnx.eval_shape(lambda: AudioAttention(TALKING, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    layer = nnx.merge(graph, jax.tree.map(lambda leaf: 0.5 * normal(*leaf.shape), state))
    video, audio, mask = normal(b, t * n, width), normal(b, s, t, a, TALKING.audio.width), jnp.abs(normal(b, s, t * n))
    frames = jnp.repeat(jnp.arange(t), n) if shared else None

    as_heads = lambda x: torch.from_numpy(np.array(x)).unflatten(-1, (heads, -1))  # noqa: E731
    normed = lambda norm, x: as_heads(norm(jnp.asarray(x.numpy())).reshape(*x.shape[:-2], width))  # noqa: E731
    q = normed(layer.q_norm, as_heads(layer.q(layer.norm(video))))
    k, v = (as_heads(x) for x in jnp.split(layer.kv(audio), 2, axis=-1))
    k = normed(layer.k_norm, k)
    attended = torch.zeros(b, t * n, width)
    for frame in range(t):
        rows = slice(frame * n, (frame + 1) * n)
        for speaker in range(s):
            parts = (x.transpose(1, 2) for x in (q[:, rows], k[:, speaker, frame], v[:, speaker, frame]))
            heard = torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
            attended[:, rows] += heard * torch.from_numpy(np.array(mask))[:, speaker, rows, None]
    expected = video + layer.out(jnp.asarray(attended.numpy()))
    assert relative_error(layer(video, audio, mask, frames) - video, expected - video) < 1e-5
