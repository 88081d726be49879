"""PyTorch's tensors as samples: with gradients, of any kind of float, and whole numbers."""

import numpy as np
import torch

from mi_jax.data.samples import samples_from

TONE = (0.5 * np.sin(0.1 * np.arange(400))).astype(np.float32)


def test_tensors_of_pytorch():
    tone = torch.tensor(TONE)
    for tensor in (tone, torch.tensor(TONE, requires_grad=True), tone[None], tone.double()):
        np.testing.assert_array_equal(samples_from(tensor, "voice 1")[:, 0], TONE)
    np.testing.assert_allclose(samples_from(tone.bfloat16(), "voice 1")[:, 0], TONE, atol=2e-3)
    np.testing.assert_allclose(samples_from((tone * 2**15).short(), "voice 1")[:, 0], TONE, atol=2**-15)
