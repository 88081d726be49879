"""How much of a GPU's memory a process takes."""

import os

GPU_SHARE = 0.93
"""Of the memory that CUDA reports. The rest is for what is not JAX's: CUDA's context, NCCL's buffers, cuDNN's plans."""


def claim_gpu_memory() -> None:
    """Lets JAX take `GPU_SHARE` instead of three quarters, unless the user says otherwise. Before JAX's first array."""
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name; both at once are an error
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(GPU_SHARE))
