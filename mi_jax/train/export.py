"""What a training run leaves, as a checkpoint that can be written as a model folder."""

import pathlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from mi_jax.errors import InputError
from mi_jax.models.dit import DiTConfig
from mi_jax.train.checkpoints import averaged_names, checkpoint_of, read_leaves
from mi_jax.weights.configs import config_from_json, read_json
from mi_jax.weights.sources import Checkpoint, Stored


def denoiser_config(run: str | pathlib.Path) -> DiTConfig:
    """The denoiser that a run trains, from the config that it keeps.

    Raises:
      InputError: no run, or one whose objective has no denoiser.
    """
    path = pathlib.Path(run) / "config.json"
    objective = read_json(path).get("objective")
    if not isinstance(objective, dict) or "dit" not in objective:
        raise InputError(f"{path}: its objective trains no denoiser")
    return config_from_json(DiTConfig, _without_classes(objective["dit"]), f"{path}: objective.dit")


def sampled_in(run: str | pathlib.Path) -> dict[str, Any]:
    """How what a run trains is sampled, where its config says so: a distilled student in its own levels, without
    guidance."""
    objective = read_json(pathlib.Path(run) / "config.json").get("objective", {})
    levels = objective.get("levels")
    if not levels:
        return {}
    evenly = [1 - i / len(levels) for i in range(len(levels))]
    uneven = any(abs(a - b) > 1e-6 for a, b in zip(levels, evenly))
    shape = {"steps": len(levels), "levels": tuple(levels) if uneven else None, "shift": objective["shift"]}
    return shape | {"guidance_audio": 0.0, "guidance_text": 0.0}


def _without_classes(value: Any) -> Any:
    """Drops the names of the classes that `train.start.as_json` adds."""
    if isinstance(value, dict):
        return {name: _without_classes(item) for name, item in value.items() if name != "class"}
    return [_without_classes(item) for item in value] if isinstance(value, list) else value


def averaged_checkpoint(run: str | pathlib.Path, turn: str | None = None, step: int | None = None) -> Checkpoint:
    """The averages of a run's trained parameters, of one turn or of all, under their names in the module: read a few
    leaves at a time, whatever the number of processes and devices that wrote them.

    step: of the checkpoint; by default the latest.

    Raises:
      InputError: `run` holds no such finished checkpoint, or no such turn.
    """
    path = checkpoint_of(run, step)
    leaves = averaged_names(path, turn)
    if turn is None and any(name.startswith("student.") for name in leaves):  # of a run that distils, its student
        turn = "student"
        leaves = averaged_names(path, turn)
    for part in ("adapter", *([turn] if turn else [])):  # where the module has others beside it
        if all(name.startswith(f"{part}.") for name in leaves):
            leaves = {name.removeprefix(f"{part}."): leaf for name, leaf in leaves.items()}
    kinds = {name: (shape, dtype) for name, shape, dtype in leaves.values()}
    order = list(kinds)
    ahead: Iterator[tuple[str, Any]] = iter(())
    last: tuple[str, Any] = ("", None)

    def read(name: str) -> np.ndarray:
        nonlocal ahead, last
        if last[0] != name:  # in order, what was read with the leaf before; else from here on
            last = next(ahead, ("", None))
        if last[0] != name:
            ahead = read_leaves(path, {later: kinds[later] for later in order[order.index(name) :]})
            last = next(ahead)
        return np.asarray(last[1])

    tensors = {
        name: Stored(shape, np.dtype(dtype), (0, order.index(leaf)), partial(read, leaf))
        for name, (leaf, shape, dtype) in leaves.items()
    }
    return Checkpoint(pathlib.Path(path), tensors)
