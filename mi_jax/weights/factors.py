"""Files of LoRA factors: safetensors, two tensors for each adapted kernel.

double.blocks.video.out.kernel.down     [*layers d rank]
double.blocks.video.out.kernel.up       [*layers rank e]
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save

from mi_jax.errors import InputError
from mi_jax.files import PathLike, disk_faults_named, existing_file, written_beside
from mi_jax.models import lora
from mi_jax.weights.sources import Checkpoint, open_checkpoint

SUFFIX = ".safetensors"
MOST_WEIGHT = 100.0

Adaptation = PathLike | tuple[PathLike, float]
"""A file of factors, or one with the weight that it is given."""


def save_factors(path: PathLike, factors: Mapping[str, lora.Factors], *, dtype: Any = np.float32) -> None:
    """Writes factors beside `path` and renames them.

    Raises:
      InputError: it does not end in .safetensors, or cannot be written.
    """
    path = pathlib.Path(path)
    if path.suffix != SUFFIX:
        raise InputError(f"{path}: factors are written to a {SUFFIX} file")
    leaves = {
        f"{name}.{side}": np.ascontiguousarray(np.asarray(getattr(pair, side)).astype(dtype))
        for name, pair in factors.items()
        for side in ("down", "up")
    }
    with disk_faults_named(path), written_beside(path) as beside:
        beside.write_bytes(save(leaves))


def load_factors(path: PathLike) -> dict[str, lora.Factors]:
    """The factors in a file, f32 on the host.

    Raises:
      InputError: it is missing, damaged or no file of factors.
    """
    return factors_of(open_checkpoint(existing_file(path, "the file of LoRA factors")))


def factors_of(checkpoint: Checkpoint) -> dict[str, lora.Factors]:
    """Factors by the names of their tensors.

    Raises:
      InputError: a tensor that is none, one without its other half, or two whose shapes do not meet.
    """
    pairs: dict[str, dict[str, np.ndarray]] = {}
    others = []
    for key, stored in checkpoint.tensors.items():
        name, _, side = key.rpartition(".")
        if side not in ("down", "up") or len(stored.shape) < 2 or not jnp.issubdtype(stored.dtype, jnp.floating):
            others.append(key)
            continue
        pairs.setdefault(name, {})[side] = stored.read().astype(np.float32)
    others += [name for name, pair in pairs.items() if len(pair) < 2 or not _meet(**pair)]
    if others or not pairs:
        listed = ", ".join(sorted(others)) if others else "it is empty"
        raise InputError(f"{checkpoint.path}: no file of LoRA factors ({listed})")
    return {name: lora.Factors(**pair) for name, pair in pairs.items()}


def _meet(down: np.ndarray, up: np.ndarray) -> bool:
    return down.shape[:-2] == up.shape[:-2] and down.shape[-1] == up.shape[-2] > 0


def combined(parts: Sequence[tuple[Mapping[str, lora.Factors], float]]) -> dict[str, lora.Factors]:
    """Several adaptations, each at its weight, as one whose rank is the sum of theirs."""
    together: dict[str, lora.Factors] = {}
    for factors, weight in parts:
        for name, pair in factors.items():
            down, up = pair.down, np.float32(weight) * pair.up
            if name in together:
                down = np.concatenate([together[name].down, down], axis=-1)
                up = np.concatenate([together[name].up, up], axis=-2)
            together[name] = lora.Factors(down, up)
    return together


def read_adaptations(files: Sequence[Adaptation | Any]) -> list[tuple[dict[str, lora.Factors], float]]:
    """Files of factors with their weights, by default 1.

    Raises:
      InputError: as `load_factors`; a weight that is no finite number.
    """
    read = []
    for entry in files:
        path, weight = entry if isinstance(entry, tuple) else (entry, 1.0)
        if not isinstance(path, PathLike) or isinstance(weight, bool) or not isinstance(weight, int | float):
            raise InputError(f"lora takes files or (file, weight), not {entry!r}")
        if not np.isfinite(weight) or abs(weight) > MOST_WEIGHT:
            raise InputError(
                f"{os.fspath(path)}: its weight is {weight}, must lie in {-MOST_WEIGHT:g}..{MOST_WEIGHT:g}"
            )
        read.append((load_factors(path), float(weight)))
    return read


def check_factors(shapes: Any, factors: Mapping[str, lora.Factors], source: str) -> None:
    """Whether a module (its state, or one without arrays) has every kernel that the factors adapt, in their shape.

    Raises:
      InputError: every kernel that it has not, or the first of another shape.
    """
    try:
        lora.check(shapes, dict(factors))
    except ValueError as fault:
        raise InputError(f"{source}: made for another model: {fault}") from None


def adapted(module: nnx.Module, factors: Mapping[str, lora.Factors], dtype: Any) -> nnx.Module:
    """The module with its kernels changed, where their dtype keeps the sum, else with the factors beside them: a sum in
    bf16 would lose most of a small change."""
    factors = dict(factors)
    if jnp.dtype(dtype) != jnp.float32:
        return lora.adapt(module, factors)
    graph, params = nnx.split(module)
    return nnx.merge(graph, lora.merge(params, factors))
