"""Orbax checkpoints of a run: its state and its place in the data, written in the background, found after a kill."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from flax import nnx
from orbax.checkpoint import v1 as ocp

from mi_jax.errors import InputError
from mi_jax.mesh import parameter_spec
from mi_jax.train.objective import Objective
from mi_jax.train.state import TrainState, split_model
from mi_jax.weights.native import is_model, load_state

FOLDER = "checkpoints"


def named_leaves(tree: Any) -> dict[str, Any]:
    """{"params.blocks.kernel": leaf}: names that do not depend on how the tree is built."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf for path, leaf in flat}


def open_checkpoints(out_dir: pathlib.Path, keep: int) -> ocp.training.Checkpointer:
    """The run's checkpoints, the last `keep` of which stay. A half-written one (a killed run's) is swept away."""
    return ocp.training.Checkpointer(
        pathlib.Path(out_dir).absolute() / FOLDER,
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        cleanup_tmp_directories=True,
    )


def save(checkpoints: ocp.training.Checkpointer, step: int, state: TrainState, place: dict[str, Any]) -> None:
    """Starts the write of a checkpoint; returns once the state may be donated. Waits for the one before, if need be.

    place: how far the data was read, the same for every process: one may be saved for any number of them.
    """
    checkpoints.save_checkpointables_async(
        step, {"state": named_leaves(state)}, force=True, custom_metadata={"data": json.dumps(place)}
    )


def restore(checkpoints: ocp.training.Checkpointer, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The latest checkpoint, laid out like `target` (`abstract`, so that no second state is in memory), and the place
    in the data that was saved with it.

    Raises:
      InputError: the checkpoint holds other parameters than `target`: another config wrote it.
    """
    wanted = named_leaves(target)
    latest = checkpoints.latest
    saved = ocp.metadata(latest.path)
    check_leaves(saved.metadata, wanted, str(latest.path))
    place = (saved.custom_metadata or {}).get("data")
    if place is None:
        raise InputError(f"{latest.path}: does not say how far the data was read; it was written by an older version")
    found = checkpoints.load_checkpointables(latest, {"state": wanted})["state"]
    return jax.tree.unflatten(jax.tree.structure(target), [found[name] for name in wanted]), json.loads(place)


def load_ema_state(run: str | pathlib.Path) -> Any:
    """The EMA of a run's trained parameters (an nnx.State), from its latest checkpoint: what a later stage starts from.

    Arrays lie on the mesh in force, spread as the trainer spreads them; without a mesh, on the first device.

    Raises:
      InputError: `run` holds no finished checkpoint.
    """
    folder = pathlib.Path(run).absolute() / FOLDER
    # A reader must not sweep half-written checkpoints away: the run may be alive and writing.
    latest = ocp.training.Checkpointer(folder).latest if folder.is_dir() else None
    if latest is None:
        raise InputError(f"{run}: holds no finished checkpoint")
    mesh = jax.sharding.get_mesh()

    def target(leaf):
        if mesh.empty:
            sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        else:
            sharding = jax.NamedSharding(mesh, parameter_spec(tuple(leaf.shape), mesh))
        return jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype, sharding=sharding)

    saved = ocp.metadata(latest.path).metadata
    wanted = {name: target(leaf) if name.startswith("ema.") else ocp.PLACEHOLDER for name, leaf in saved.items()}
    found = ocp.load(latest.path, wanted)
    names = {name: name.removeprefix("ema.").split(".") for name in wanted if name.startswith("ema.")}
    paths = {tuple(int(part) if part.isdigit() else part for part in parts): name for name, parts in names.items()}
    return nnx.from_flat_state({path: nnx.Param(found[name]) for path, name in paths.items()})


def load_ema(run: str | pathlib.Path, objective: Objective) -> nnx.Module:
    """The whole module of a run, with its EMA parameters; those that were not trained are as `init` makes them.

    Raises:
      InputError: `run` holds no finished checkpoint, or one of another objective.
    """
    config = pathlib.Path(run) / "config.json"
    if not config.is_file():
        raise InputError(f"{config}: no such file; {run} is no training run")
    averaged = named_leaves(load_ema_state(run))
    init_key, _ = jax.random.split(jax.random.key(json.loads(config.read_text())["seed"]))
    graph, params, frozen = split_model(objective.init(init_key), objective)
    wanted = named_leaves(params)
    check_leaves(averaged, wanted, str(run))
    ema = jax.tree.unflatten(jax.tree.structure(params), [averaged[name] for name in wanted])
    return nnx.merge(graph, ema, frozen)


def warm_start(model: nnx.Module, source: str | pathlib.Path, part: str) -> nnx.Module:
    """`model` with every leaf that `source` has: a run's averaged ones, or those saved as `part` in a model folder.

    What only the model has stays as initialised.

    Raises:
      InputError: `source` is neither, or has a leaf that the model lacks or has in another shape.
    """
    saved = load_state(source, part) if is_model(source) else load_ema_state(source)
    graph, state = nnx.split(model)
    old = dict(nnx.to_flat_state(saved))
    leaves = {}
    for path, leaf in nnx.to_flat_state(state):
        leaves[path] = old.pop(path, leaf)
        if leaves[path].shape != leaf.shape:
            name = ".".join(map(str, path))
            raise InputError(f"{source}: {name} is {leaves[path].shape}, the model wants {leaf.shape}")
    if old:
        raise InputError(f"{source}: leaves that the model lacks: {sorted('.'.join(map(str, p)) for p in old)}")
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def check_leaves(found: dict[str, Any], wanted: dict[str, Any], source: str) -> None:
    """Every name, shape and dtype of `found` must be the wanted one.

    Raises:
      InputError: one line that counts and names what differs.
    """
    shared = sorted(wanted.keys() & found.keys())
    faults = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unknown": sorted(found.keys() - wanted.keys()),
        "of another shape": [name for name in shared if tuple(found[name].shape) != tuple(wanted[name].shape)],
        "of another dtype": [name for name in shared if np.dtype(found[name].dtype) != np.dtype(wanted[name].dtype)],
    }
    listed = [f"{len(names)} {what} (the first is {names[0]})" for what, names in faults.items() if names]
    if listed:
        raise InputError(f"{source}: written by another config; leaves: {', '.join(listed)}")


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of arrays, without the arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
