"""Orbax checkpoints of a run: its state and its place in the data, written in the background, found after a kill."""

import contextlib
import gc
import json
import logging
import math
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from mi_jax.avatar.folders import holds_model, part_state
from mi_jax.errors import InputError
from mi_jax.mesh import parameter_spec
from mi_jax.train.fingerprints import fingerprints, words
from mi_jax.train.objective import Objective
from mi_jax.train.state import TrainState, merge_model, split_model
from mi_jax.weights.configs import read_json

FOLDER = "checkpoints"
PRINTS = "fingerprints"
READ_BYTES = 2**30

log = logging.getLogger("mi_jax")


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


def save(checkpoints: ocp.training.Checkpointer, step: int, state: TrainState, notes: dict[str, Any]) -> None:
    """Starts the write of a checkpoint; returns once the state may be donated. Waits for the one before, if need be.

    A fingerprint of every leaf is saved beside them: what is read later is held against it.

    notes: JSON to be found again by `restore`, the same for every process: one may be saved for any number of them.

    Raises:
      InputError: the disk is full, or cannot be written any more.
    """
    leaves = named_leaves(state)
    notes = notes | {PRINTS: dict(zip(leaves, words(fingerprints(state)), strict=True))}
    with _writing(checkpoints):
        checkpoints.save_checkpointables_async(
            step, {"state": leaves}, force=True, custom_metadata={name: json.dumps(x) for name, x in notes.items()}
        )


@contextlib.contextmanager
def _writing(checkpoints: ocp.training.Checkpointer) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as fault:  # a full disk is an OSError of Python's or a ValueError of TensorStore's
        if not re.search(r"[Nn]o space|ENOSPC|quota|RESOURCE_EXHAUSTED|[Rr]ead-only|[Pp]ermission", str(fault)):
            raise
        raise InputError(f"{checkpoints.directory}: a checkpoint cannot be written ({_one_line(fault)})") from fault


def close(checkpoints: ocp.training.Checkpointer) -> None:
    """Finishes the checkpoint under way. Raises as `save` does."""
    with _writing(checkpoints):
        checkpoints.close()


def restore(checkpoints: ocp.training.Checkpointer, target: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The newest whole checkpoint, laid out like `target` (shapes, dtypes and shardings: no second state is in memory),
    and the notes that were saved with it.

    One is whole if all of it can be read and every leaf has the fingerprint that it was saved with. Newer ones that are
    not are said, and moved to the folder `damaged` beside `checkpoints`.

    Raises:
      InputError: none is whole; or the newest whole one holds other parameters than `target`: another config wrote it.
    """
    damaged = []
    for checkpoint in reversed(checkpoints.checkpoints):
        fault, found = None, None
        try:
            with _quiet():
                found = _read(checkpoints, checkpoint, target)
        except InputError:
            raise
        except Exception as error:  # whatever Orbax and TensorStore raise on damaged files
            if isinstance(error, jax.errors.JaxRuntimeError):  # a device's memory, not the file's fault
                raise
            fault = _one_line(error)
        faults = _everywhere(fault)
        if not faults:
            for number, other in enumerate(damaged):
                _set_aside(checkpoints, other, number)
            return found
        damaged.append(checkpoint)
        log.warning("%s: damaged, an older checkpoint is looked for (%s)", checkpoint.path, faults)
    raise InputError(f"{checkpoints.directory}: none of its {len(damaged)} checkpoints is whole")


def _read(checkpoints: ocp.training.Checkpointer, checkpoint: Any, target: TrainState) -> tuple[TrainState, dict]:
    saved = ocp.metadata(checkpoint.path)
    leaves = named_leaves(target)
    names = [_before_turns(name) if _has_no_turns(saved.metadata) else name for name in leaves]
    wanted = dict(zip(names, leaves.values(), strict=True))
    check_leaves(saved.metadata, wanted, str(checkpoint.path))
    notes = {name: json.loads(note) for name, note in (saved.custom_metadata or {}).items()}
    if "data" not in notes:
        raise ValueError("does not say how far the data was read")
    loaded = checkpoints.load_checkpointables(checkpoint, {"state": wanted})["state"]
    state = jax.tree.unflatten(jax.tree.structure(target), [loaded[name] for name in names])
    _hold_against(notes.get(PRINTS), dict(zip(leaves, words(fingerprints(state)), strict=True)))
    return state, notes


def _hold_against(saved: dict[str, str] | None, read: dict[str, str]) -> None:
    """Raises ValueError where what was read is not what was saved. Checkpoints of before say nothing of it."""
    if saved is not None:
        other = [name for name, print_ in read.items() if saved.get(name) != print_]
        if other:
            raise ValueError(f"{len(other)} leaves are not as they were saved, the first is {other[0]}")


def _everywhere(fault: str | None) -> str | None:
    """A fault that any process met: all take the same checkpoint."""
    if jax.process_count() == 1:
        return fault
    met = multihost_utils.process_allgather(np.array(fault is not None))
    return (fault or "another process could not read it") if met.any() else None


def _set_aside(checkpoints: ocp.training.Checkpointer, checkpoint: Any, number: int) -> None:
    place = pathlib.Path(checkpoints.directory).parent / "damaged"
    if jax.process_index() == 0:
        place.mkdir(exist_ok=True)
        target = place / f"{checkpoint.step}"
        while target.exists():
            number += 1
            target = place / f"{checkpoint.step}-{number}"
        pathlib.Path(checkpoint.path).rename(target)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{checkpoint.path} is moved")
    checkpoints.reload()


def check(run: str | pathlib.Path) -> Iterator[tuple[str, int, str | None]]:
    """(path, leaves, what is damaged or None) of every checkpoint of a run, read on the host a few leaves at a time.

    Raises:
      InputError: `run` holds no checkpoint.
    """
    folder = pathlib.Path(run).absolute() / FOLDER
    found = ocp.training.Checkpointer(folder).checkpoints if folder.is_dir() else []
    if not found:
        raise InputError(f"{run}: holds no finished checkpoint")
    for checkpoint in found:
        count, fault = 0, None
        try:
            saved = _metadata(checkpoint.path)
            prints, count = _prints_of(saved), len(saved.metadata)
            if prints and prints.keys() != saved.metadata.keys():
                raise ValueError("holds other leaves than were saved")
            for _ in read_leaves(checkpoint.path, {n: (tuple(x.shape), x.dtype) for n, x in saved.metadata.items()}):
                pass
        except Exception as error:
            fault = _one_line(error).removeprefix(f"{checkpoint.path}: damaged (").removesuffix(")")
        yield str(checkpoint.path), count, fault


@contextlib.contextmanager
def _undamaged(path: Any) -> Iterator[None]:
    """Whatever Orbax raises over a checkpoint becomes an InputError: its files are not as they were written."""
    try:
        with _quiet():
            yield
    except (InputError, jax.errors.JaxRuntimeError):  # the latter: a device's memory
        raise
    except Exception as fault:
        raise InputError(f"{path}: damaged ({_one_line(fault)})") from fault


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Of a leaf that cannot be read, the tasks that read the others say so, too, long after it was said."""
    loggers = [logging.getLogger(name) for name in ("asyncio", "absl")]
    before, hook = [logger.level for logger in loggers], sys.unraisablehook
    sys.unraisablehook = lambda _: None
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    except Exception:
        gc.collect()  # so that all of them say so now
        raise
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _metadata(path: Any) -> Any:
    """What a checkpoint says of itself.

    Raises:
      InputError: nothing, or nothing that can be understood.
    """
    with _undamaged(path):
        saved = ocp.metadata(path)
        if not saved.metadata:
            raise ValueError("names no leaves")
        return saved


def read_leaves(path: Any, leaves: Mapping[str, tuple[tuple[int, ...], Any]]) -> Iterator[tuple[str, jax.Array]]:
    """(name, leaf) of the leaves that are asked for by name -> (shape, dtype), in that order, in the host's memory.

    Every read of a checkpoint reads all its metadata, so that leaves are read by `READ_BYTES`, one at least.

    Raises:
      InputError: a leaf is not as it was saved.
    """
    on_host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    saved = _metadata(path)
    with _undamaged(path):
        prints, others = _prints_of(saved), dict.fromkeys(saved.metadata, ocp.PLACEHOLDER)
    for names in _groups({name: _bytes(*leaf) for name, leaf in leaves.items()}):
        wanted = {name: jax.ShapeDtypeStruct(*leaves[name], sharding=on_host) for name in names}
        with _undamaged(path):
            read = ocp.load(path, others | wanted)
            found = words(fingerprints([read[name] for name in names]))
            _hold_against(prints, dict(zip(names, found, strict=True)))
        for name in names:
            yield name, read.pop(name)


def _groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Successive names whose sizes are together no more than `READ_BYTES`, or a single one."""
    group, total = [], 0
    for name, size in sizes.items():
        if group and total + size > READ_BYTES:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def _prints_of(saved: Any) -> dict[str, str] | None:
    """The fingerprints in a checkpoint's metadata; None in one of before.

    Raises ValueError where there is nothing of what every checkpoint says beside its leaves.
    """
    if not saved.custom_metadata:
        raise ValueError("does not say what was saved")
    return json.loads(saved.custom_metadata.get(PRINTS, "null"))


def _one_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _has_no_turns(names: Iterable[str]) -> bool:
    """Whether a checkpoint was written before objectives had turns: "params.blocks", not "params.model.blocks"."""
    return any(re.match(r"opt_state\.\d", name) for name in names)


def _before_turns(name: str) -> str:
    """What a leaf of the only turn was called then."""
    return re.sub(r"^(params|opt_state|ema)\.model\.", r"\1.", name)


def checkpoint_of(run: str | pathlib.Path, step: int | None = None) -> Any:
    """The folder of a run's latest checkpoint, or of that of `step`.

    Raises:
      InputError: `run` holds no finished checkpoint, or none of `step`.
    """
    folder = pathlib.Path(run).absolute() / FOLDER
    # A reader must not sweep half-written checkpoints away: the run may be alive and writing.
    found = {x.step: x.path for x in ocp.training.Checkpointer(folder).checkpoints} if folder.is_dir() else {}
    if not found:
        raise InputError(f"{run}: holds no finished checkpoint")
    if step is None:
        return found[max(found)]
    if step not in found:
        raise InputError(f"{run}: holds no finished checkpoint of step {step}, only of {', '.join(map(str, found))}")
    return found[step]


def averaged_names(path: Any, turn: str | None = None) -> dict[str, Any]:
    """What a checkpoint holds of the trained parameters as they are sampled, by their dotted path in the module: the
    name of its leaf, shape and dtype. Averages where a turn keeps some, else its parameters; of one turn or of all.

    Raises:
      InputError: there is no such turn.
    """
    saved = _metadata(path).metadata
    old = _has_no_turns(saved)
    leaves: dict[str, Any] = {}
    for field in ("params", "ema"):
        for name, leaf in saved.items():
            if name.startswith(f"{field}."):
                of, rest = ("model", name.removeprefix(f"{field}.")) if old else name.split(".", 2)[1:]
                if turn in (None, of):
                    leaves[rest] = (name, tuple(leaf.shape), leaf.dtype)
    if not leaves:
        raise InputError(f"{path}: holds no turn {turn!r}")
    return leaves


def load_ema_state(run: str | pathlib.Path, turn: str | None = None) -> Any:
    """The averages of a run's trained parameters (an nnx.State), of one turn or of all, from its latest checkpoint.
    A turn that keeps no average gives its parameters.

    Arrays lie on the mesh in force, spread as the trainer spreads them; without a mesh, on the first device.

    Raises:
      InputError: `run` holds no finished checkpoint, no such turn, or a damaged one.
    """
    path = checkpoint_of(run)
    mesh = jax.sharding.get_mesh()

    def target(shape, dtype):
        if mesh.empty:
            sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        else:
            sharding = jax.NamedSharding(mesh, parameter_spec(shape, mesh))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    leaves = averaged_names(path, turn)
    saved = _metadata(path)
    wanted = dict.fromkeys(saved.metadata, ocp.PLACEHOLDER)
    wanted |= {name: target(shape, dtype) for name, shape, dtype in leaves.values()}
    names = [name for name, _, _ in leaves.values()]
    with _undamaged(path):
        loaded = ocp.load(path, wanted)
        found = words(fingerprints([loaded[name] for name in names]))
        _hold_against(_prints_of(saved), dict(zip(names, found, strict=True)))
    paths = {
        tuple(int(part) if part.isdigit() else part for part in rest.split(".")): leaves[rest][0] for rest in leaves
    }
    return nnx.from_flat_state({path: nnx.Param(loaded[name]) for path, name in paths.items()})


def load_ema(run: str | pathlib.Path, objective: Objective) -> nnx.Module:
    """The whole module of a run, with its averaged parameters; those that were not trained are as at its step 0.

    Raises:
      InputError: `run` holds no finished checkpoint, or one of another objective.
    """
    config = pathlib.Path(run) / "config.json"
    if not config.is_file():
        raise InputError(f"{config}: no such file; {run} is no training run")
    averages = named_leaves(load_ema_state(run))
    init_key, _ = jax.random.split(jax.random.key(read_json(config)["seed"]))
    graph, params, frozen = split_model(nnx.eval_shape(objective.init, init_key), objective)
    if jax.tree.leaves(frozen):
        frozen = split_model(at_start(objective, init_key), objective)[2]
    wanted = {name: leaf for part in params.values() for name, leaf in named_leaves(part).items()}
    check_leaves(averages, wanted, str(run))
    ema = {
        turn: jax.tree.unflatten(jax.tree.structure(part), [averages[name] for name in named_leaves(part)])
        for turn, part in params.items()
    }
    return merge_model(graph, ema, frozen)


def at_start(objective: Objective, key: jax.Array) -> nnx.Module:
    """The module at step 0."""
    model = objective.init(key)
    return objective.warm_start(model) if hasattr(objective, "warm_start") else model


def start_from(model: nnx.Module, source: str | pathlib.Path, part: str, *, whole: bool = False) -> nnx.Module:
    """`model` with every leaf that `source` has: a run's averaged ones, or those saved as `part` in a model folder.

    What only the model has stays as initialised; `whole`: there must be nothing of the kind.

    Raises:
      InputError: `source` is neither, or has a leaf that the model lacks or has in another shape.
    """
    saved = part_state(source, part) if holds_model(source) else _averages_of(source)
    graph, state = nnx.split(model)
    old = dict(nnx.to_flat_state(saved))
    leaves = {}
    missing = sorted(".".join(map(str, path)) for path, _ in nnx.to_flat_state(state) if path not in old)
    if whole and missing:
        raise InputError(f"{source}: lacks {len(missing)} of the model's leaves, the first is {missing[0]}")
    for path, leaf in nnx.to_flat_state(state):
        leaves[path] = old.pop(path, leaf)
        if leaves[path].shape != leaf.shape:
            name = ".".join(map(str, path))
            raise InputError(f"{source}: {name} is {leaves[path].shape}, the model wants {leaf.shape}")
    if old:
        raise InputError(f"{source}: leaves that the model lacks: {sorted('.'.join(map(str, p)) for p in old)}")
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def _averages_of(run: str | pathlib.Path) -> Any:
    """The averages of a run's model; of one that distils, of its student."""
    turns = {name.split(".")[1] for name in _metadata(checkpoint_of(run)).metadata if name.startswith("params.")}
    if "student" not in turns:
        return load_ema_state(run)
    student = load_ema_state(run, "student")
    return student.get("student", student)


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
