"""Where a run begins: at step 0, or at its newest whole checkpoint; and the config that it keeps beside it."""

import dataclasses
import hashlib
import json
import logging
import pathlib
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from orbax.checkpoint import v1 as ocp

from mi_jax.errors import InputError
from mi_jax.files import written_beside
from mi_jax.mesh import parameter_spec, shard_parameters
from mi_jax.train.checkpoints import at_start, restore
from mi_jax.train.fingerprints import fingerprints, words
from mi_jax.train.objective import TrainConfig
from mi_jax.train.state import TrainState, init_state, split_model
from mi_jax.weights.configs import read_json

CONFIG = "config.json"

log = logging.getLogger("mi_jax")


def start(
    config: TrainConfig, mesh: Mesh, checkpoints: ocp.training.Checkpointer, out_dir: pathlib.Path
) -> tuple[TrainState, tuple[Any, Any], Any]:
    """(state, (graph definition, frozen parameters), place in the data): of the newest whole checkpoint, or of step 0.

    Masters, moments and EMA are spread over the mesh. A run that goes on draws and reads nothing that its checkpoint
    holds: what it once started from need not be there any more.

    Raises:
      InputError: no checkpoint is whole; the newest that is whole is of another config, or was trained beside other
        frozen parameters.
    """
    objective = config.objective
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    make_state = jax.jit(lambda params, key: init_state(config, params, key))
    abstract = nnx.eval_shape(objective.init, init_key)
    graph, params, frozen = split_model(abstract, objective)
    goes_on = checkpoints.latest is not None
    if not goes_on or jax.tree.leaves(frozen):
        graph, drawn, frozen = split_model(at_start(objective, init_key), objective)
        frozen = shard_parameters(frozen, mesh)
        if not goes_on:
            state = make_state(shard_parameters(drawn, mesh), step_key)
            return state, (graph, frozen), None
        del drawn
    _say_what_changed(config, out_dir)
    laid_out = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, parameter_spec(leaf.shape, mesh))
        ),
        params,
    )
    lowered = make_state.lower(laid_out, step_key)
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        lowered.out_info,
        lowered.compile().output_shardings,
    )
    state, notes = restore(checkpoints, target)
    if notes.get("frozen", found := fingerprint_of(frozen)) != found:
        raise InputError(
            f"{out_dir}: the parameters that are not trained are no longer those that the run began with: its seed, or "
            "the weights that it starts from, changed"
        )
    return state, (graph, frozen), notes["data"]


def fingerprint_of(frozen: Any) -> str:
    """What tells frozen parameters from others, in one word."""
    return hashlib.sha256("".join(words(fingerprints(frozen))).encode()).hexdigest()[:16]


def _say_what_changed(config: TrainConfig, out_dir: pathlib.Path) -> None:
    """Logs which fields of the config differ from those that the run was last started with."""
    try:
        before = _flat(read_json(out_dir / CONFIG))
    except InputError:
        return
    now = _flat(as_json(config))
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        changes = ", ".join(f"{name} {before.get(name)} -> {now.get(name)}" for name in changed)
        log.warning("%s goes on with another config: %s", out_dir, changes)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """{"objective.shift": 3.0}; a class by its name alone, wherever it lives."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{name}.{key}" if name else key).items()}
    return {name: value.rpartition(".")[2] if name.rpartition(".")[2] == "class" else value}


def keep_config(config: TrainConfig, out_dir: pathlib.Path) -> None:
    """Writes the run's config.json: to be read by people and compared when the run goes on."""
    with written_beside(out_dir / CONFIG) as beside:
        beside.write_text(json.dumps(as_json(config), indent=2) + "\n")


def as_json(value: Any) -> Any:
    """A config as JSON: dataclasses as objects that name their class, whatever JSON has no form for as its repr."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": f"{type(value).__module__}.{type(value).__qualname__}", **fields}
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return str(value) if isinstance(value, pathlib.PurePath) else repr(value)
