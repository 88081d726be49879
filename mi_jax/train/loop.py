"""The trainer: one function for every objective, read from top to bottom."""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import absl.flags
import grain
import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mi_jax.errors import InputError
from mi_jax.mesh import gather_parameters, make_mesh, on_mesh, shard_parameters
from mi_jax.train import checkpoints as ckpt
from mi_jax.train.logging import RunLog
from mi_jax.train.objective import TrainConfig
from mi_jax.train.pool import check_pool, kind_of_call, pool_on
from mi_jax.train.state import TrainState, init_state, make_step, make_steps, split_model


def train(config: TrainConfig, out_dir: str | pathlib.Path) -> TrainState:
    """Trains `config.objective` for `config.steps` steps; goes on from the latest checkpoint in `out_dir`, if any.

    Writes under `out_dir`: config.json, checkpoints/, tensorboard/, metrics.csv. A run that was killed and started
    again ends with the same bits as one that was not: the state holds the key, the checkpoint the place in the data.
    SIGTERM, which schedulers send before they take a machine back, ends a run after the step under way, with a
    checkpoint. With `config.on_device` all of this holds for calls of several steps.

    Raises:
      SystemExit: of code 143, after a SIGTERM.
      InputError: `out_dir` cannot be written or holds checkpoints of another config; the dataset ends, or its batch
        does not divide over the devices; what samples need is not there; there is no pool to train from on the
        device, or it does not fit.
    """
    mesh = make_mesh(seq=config.seq)
    with on_mesh(mesh):
        return _train(config, pathlib.Path(out_dir), mesh)


def _train(config: TrainConfig, out_dir: pathlib.Path, mesh: Mesh) -> TrainState:
    objective = config.objective
    chief = jax.process_index() == 0
    check_pool(config)
    if config.sample_every and hasattr(objective, "check_sample"):
        objective.check_sample()

    # --- Model and state: masters, moments and EMA spread over the mesh
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    graph, params, frozen = split_model(objective.init(init_key), objective)
    params, frozen = shard_parameters(params, mesh), shard_parameters(frozen, mesh)
    state = jax.jit(lambda params, key: init_state(config, params, key))(params, step_key)
    step_fn = make_steps(config, graph) if config.on_device else make_step(config, graph)
    del params

    # --- Checkpoints: go on where the last one stands
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        checkpoints = ckpt.open_checkpoints(out_dir, config.keep)
    except OSError as error:
        raise InputError(f"{out_dir}: cannot be written ({error.strerror or error})") from None
    place = None
    if checkpoints.latest is not None:
        target = ckpt.abstract(state)
        del state  # two would need twice the memory
        state, place = ckpt.restore(checkpoints, target)
    start = int(jax.device_get(state.step))
    if chief:
        (out_dir / "config.json").write_text(json.dumps(as_json(config), indent=2) + "\n")

    # --- Data
    # Grain's worker processes ask absl for flags, which only an absl program has parsed.
    if not absl.flags.FLAGS.is_parsed():
        absl.flags.FLAGS.mark_as_parsed()
    share, shares = share_of_batch(mesh)
    dataset = objective.dataset(config.seed, share, shares)
    sample = getattr(objective, "sample", None) if config.sample_every else None
    indexed = isinstance(dataset, grain.MapDataset)
    preview = arrays_of(dataset[0] if indexed else next(iter(dataset))) if sample else None
    pool = iterator = None
    if config.on_device:
        pool, kinds = pool_on(mesh, objective), objective.kinds()
    else:
        iterator = _read_ahead(dataset, config.workers, start, place)
    by_step = indexed or config.on_device  # the step alone says where to go on

    # --- The loop. It reads a call's numbers only after the next one is under way, so the devices never wait for the
    # log. A call is one step, or `on_device` of them.
    log = RunLog(out_dir, config.name, start, config.steps) if chief else None
    pending, interval, clock = [], [], None
    try:
        with _sigterm() as asked_to_stop:
            each = config.on_device or 1
            done = start
            while (step := done) < config.steps:
                call = step // each
                done = min((call + 1) * each, config.steps)
                if pool is None:
                    told = (to_devices(_next(iterator, step), mesh, shares),)
                else:
                    told = pool, kind_of_call(config.seed, call, kinds), done - step
                with jax.transfer_guard_host_to_device("disallow"):
                    state, metrics = step_fn(state, frozen, *told)
                last, stop = done == config.steps, asked_to_stop(call + 1)
                saving = _due(config.checkpoint_every, step, done) or last or stop
                clock = clock or (done, time.perf_counter())  # from here on: compiling is not speed
                pending.append((step, done, metrics))

                # What a checkpoint holds is logged before: a run that goes on from it has the whole log.
                while len(pending) > (0 if saving else 1):
                    before, count, values = pending.pop(0)
                    interval += _each_step(jax.device_get(values))
                    if log:
                        log.progress(count - before)
                    if _due(config.log_every, before, count) or count == config.steps:
                        now = time.perf_counter()
                        speed = (count - clock[0]) / (now - clock[1])
                        if log:
                            log.scalars(count, summarise(interval) | {"steps_per_second": speed})
                        interval, clock = [], (count, now)

                if saving:
                    ckpt.save(checkpoints, done, state, {"batches": done} if by_step else iterator.get_state())
                if sample and (_due(config.sample_every, step, done) or last):
                    averaged = gather_parameters((state.ema, frozen))  # all processes take part in it
                    if log:
                        here = jax.tree.map(lambda leaf: leaf.addressable_data(0), (averaged, step_key))
                        with on_mesh(make_mesh(data=1, devices=jax.local_devices()[:1])):
                            averaged, key = nnx.merge(graph, *here[0]), jax.random.fold_in(here[1], done)
                            log.samples(done, sample(averaged, preview, key))
                if stop and not last:
                    raise SystemExit(128 + signal.SIGTERM)
    finally:
        checkpoints.close()  # a checkpoint under way is finished first
        if hasattr(iterator, "close"):
            iterator.close()  # ends Grain's processes
        if log:
            log.close()
    return state


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[int], bool]]:
    """Gives a function of the calls done: whether all processes are to stop there, because one was sent SIGTERM.
    They are counted one by one, for what processes agree on is the next number after the highest."""
    if jax.process_count() > 1:  # jax.distributed listens for the signal itself, and agrees on the call
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield lambda step: False
        return
    received = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield lambda step: received.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def _read_ahead(dataset: grain.MapDataset | grain.IterDataset, workers: int, start: int, place: Any) -> Any:
    """The batches from step `start` on: by their number, or (an `IterDataset`'s) from where `place` says."""
    if isinstance(dataset, grain.MapDataset):
        # A step is a batch, so the step says where to go on, with any number of workers.
        threads = 1 if workers else min(16, os.cpu_count() or 1)
        # Grain's own default reads 500 batches ahead: gigabytes, when a batch is video.
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        dataset = dataset[start:].to_iter_dataset(options)
        return iter(dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers), _end_with_parent))
    iterator = iter(dataset)
    if place is not None:
        iterator.set_state(place)
    return iterator


def _end_with_parent(*_: int) -> None:
    """Grain's processes would outlive a trainer that was killed, and keep its pipes and memory."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def share_of_batch(mesh: Mesh) -> tuple[int, int]:
    """Which share of every batch this process draws, and how many there are: the rows of its devices along `data`."""
    rows = mesh.shape["data"]
    own = NamedSharding(mesh, P("data")).addressable_devices_indices_map((rows,)).values()
    own = sorted({index[0].indices(rows)[0] for index in own})
    if rows % len(own) or own[0] % len(own) or own != list(range(own[0], own[0] + len(own))):
        raise InputError(f"a process has rows {own} of the {rows} along `data`: not an equal share in one piece")
    return own[0] // len(own), rows // len(own)


def to_devices(batch: dict[str, Any], mesh: Mesh, shares: int = 1) -> dict[str, jax.Array]:
    """This process's share of a batch, as global arrays split over `data` along their first axis; text is dropped."""
    sharding = NamedSharding(mesh, P("data"))

    def place(x):
        return jax.make_array_from_process_local_data(sharding, x, (len(x) * shares, *x.shape[1:]))

    try:
        return {name: place(x) for name, x in arrays_of(batch).items()}
    except ValueError as error:
        shapes = {name: x.shape for name, x in arrays_of(batch).items()}
        raise InputError(f"a batch of {shapes} does not divide over data={mesh.shape['data']}: {error}") from None


def arrays_of(batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """The numeric arrays of a batch that have a batch axis."""
    return {
        name: x for name, x in batch.items() if isinstance(x, np.ndarray) and x.ndim and x.dtype.kind not in "OSUMm"
    }


def _due(every: int, before: int, done: int) -> bool:
    """Whether a multiple of `every` lies among the steps after `before` up to `done`."""
    return done // every > before // every


def _each_step(metrics: dict[str, np.ndarray]) -> list[dict[str, float]]:
    """The numbers of each step of a call: [count] of several, scalars of one."""
    rows = zip(*map(np.atleast_1d, metrics.values()), strict=True)
    return [dict(zip(metrics, map(float, row), strict=True)) for row in rows]


def summarise(interval: list[dict[str, float]]) -> dict[str, float]:
    """Means over an interval's finite values; the last one of what is a state rather than a measurement."""
    summary = {}
    for name in sorted(interval[-1], key=lambda name: (name != "loss", name)):
        values = [metrics[name] for metrics in interval]
        finite = [value for value in values if math.isfinite(value)]
        if name in ("skipped", "learning_rate"):
            summary[name] = values[-1]
        else:
            summary[name] = sum(finite) / len(finite) if finite else math.nan
    return summary


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


def _next(iterator: Any, step: int) -> dict[str, Any]:
    try:
        return next(iterator)
    except StopIteration:
        raise InputError(f"the dataset ends after {step} batches; a training set repeats without end") from None
