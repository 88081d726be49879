"""What is trained (`Objective`), how it is trained (`TrainConfig`), and reading both from an experiment's file."""

import dataclasses
import pathlib
import runpy
from collections.abc import Iterable
from typing import Annotated, Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

import jax
from flax import nnx

from mi_jax.bounds import Devices, Seed, Steps, Within, Workers, check_fields
from mi_jax.errors import InputError
from mi_jax.train.turns import OptimizerConfig


@runtime_checkable
class Objective(Protocol):
    """A model, its data and its loss. Implementations are frozen, keyword-only dataclasses, part of the config.

    Some members are optional:
      warm_start(model) -> nnx.Module: the module at step 0, where `init`'s is to start from earlier weights. A run that
        goes on reads its checkpoint instead, unless some parameters are frozen.
      turns: the `Turn`s, each with the part of the module that it trains; without them all of it is one. What none
        trains is frozen: it keeps its values and dtypes, and no checkpoint holds it.
      turn(step) -> str: with several turns, the name of the one whose step it is, by the number of the step alone.
      after(turn, params, others, step) -> params: a turn's parameters once they are updated, from these, those of the
        other turns by name, and the step; traced.
      shows() -> bool: whether there is anything to show while training; raises InputError where something that it needs
        is missing. Asked before step 0. With it come
      sample(model, batch, key) -> arrays: traced, on the mesh that trains, of the dataset's first batch, the same one
        every time, and the averaged parameters in the compute dtype; and
      show(sampled) -> dict[str, np.ndarray | float]: of these arrays as NumPy's, on one process: uint8 pictures
        [H W 3], videos [f H W 3] or numbers.
      pool() -> dict[str, np.ndarray], kinds() -> tuple[float, ...], draw(pool, key, kind) -> dict[str, jax.Array]:
        all three, for `TrainConfig.on_device`. The pool is all of the training set, to lie whole in the memory of every
        device; kinds are the shares of the kinds of batches (one program each); `draw` is jittable but for `kind`, a
        number: one batch as `loss` takes it, by the key alone, spread over the mesh's `data`.
    """

    def init(self, key: jax.Array) -> nnx.Module:
        """The module, all trained parameters f32. The same key must give the same module; it is also called for its
        shapes alone (`nnx.eval_shape`)."""
        ...

    def dataset(self, seed: int, share: int = 0, shares: int = 1) -> Iterable[dict[str, Any]]:
        """A Grain dataset (`MapDataset` or `IterDataset`) of batches, without end: dicts of NumPy arrays whose first
        axis is the batch. Entries that are not numeric arrays (names, prompts) are dropped before the step.

        With several shares, only this one's rows of every batch (`data.batches.batches`): a process of a large run
        draws no others."""
        ...

    def loss(
        self, model: nnx.Module, batch: dict[str, jax.Array], key: jax.Array, turn: str, step: jax.Array | int
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """What the turn of this name minimises at step 0, 1, ... of the run, for each example [b], and scalars to log
        beside it."""
        ...


O = TypeVar("O")  # noqa: E741 (an Objective; unbound, because a Protocol bound hides the fields from the command line)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Generic[O]):
    """One experiment.

    name: what the experiment is called in logs.
    steps: optimiser steps in the whole run; the run is done when this many have been taken or skipped.
    optimizer: of every turn that has none of its own.
    compute_dtype: the masters are f32; the loss sees the parameters in this dtype.
    matmul_precision: JAX's, for products of f32; "bfloat16" rounds their operands, not their sums
      (`models.layers.matmul`).
    accumulate: parts that every batch is split into, one after the other; their gradients' mean is one step's.
    seq: devices that share the tokens of one example (`make_mesh`); the others share the batch.
    workers: processes that read ahead and make batches, where the dataset is a `MapDataset`; 0 leaves it to threads.
    checkpoint_every, keep: steps between checkpoints, and how many of them stay.
    log_every, sample_every: steps between log lines (means over the interval) and between samples; 0 samples never.
    on_device: optimiser steps a call, their batches drawn on the device out of a pool of all training data that lies in
      its memory (for objectives that have one); 0 reads batches on the host, one a step. Calls end at the multiples of
      it and at `steps`; checkpoints, log lines and samples fall due at the end of the call in which their step lies.
      Each call draws one kind of batch, so the last call of a run, where it is shorter, compiles a program of its own.
    """

    name: str
    objective: O
    steps: Steps
    optimizer: OptimizerConfig
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    matmul_precision: Literal["default", "bfloat16", "float32"] = "default"
    seed: Seed = 0
    accumulate: Annotated[int, Within(1, 10**6)] = 1
    seq: Devices = 1
    workers: Workers = 0
    checkpoint_every: Steps = 1000
    keep: Annotated[int, Within(1, 10**6)] = 2
    log_every: Steps = 10
    sample_every: Annotated[int, Within(0, 10**9)] = 500
    on_device: Annotated[int, Within(0, 10**6)] = 0

    def __post_init__(self):
        check_fields(self)


def load_config(path: str | pathlib.Path, overrides: list[str] | tuple[str, ...] = ()) -> TrainConfig:
    """Runs an experiment's Python file and takes its module-level `config`, with `overrides` as command-line arguments.

    `load_config("configs/puppet_vae.py", ["--steps", "100", "--objective.batch-size", "2"])`

    Raises:
      InputError: the file is missing, or defines no `TrainConfig` named `config`.
      SystemExit: tyro's, for an override that does not exist or does not parse (code 2), and for --help (code 0).
    """
    import tyro

    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such config file")
    config = runpy.run_path(str(path)).get("config")
    if not isinstance(config, TrainConfig):
        raise InputError(f"{path}: defines no TrainConfig named `config`")
    if not overrides:
        return config
    kind = TrainConfig[type(config.objective)]
    return tyro.cli(kind, default=config, args=list(overrides), prog=f"mi-jax train {path}")
