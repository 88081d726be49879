"""The trainer: one function for every objective, read from top to bottom."""

import contextlib
import itertools
import math
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import absl.flags
import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mi_jax.errors import InputError
from mi_jax.files import locked
from mi_jax.mesh import make_mesh, on_mesh
from mi_jax.train import checkpoints as ckpt
from mi_jax.train.logging import RunLog
from mi_jax.train.objective import TrainConfig
from mi_jax.train.pool import check_pool, kind_of_call, pool_on
from mi_jax.train.samples import sampler
from mi_jax.train.start import fingerprint_of, keep_config, start
from mi_jax.train.state import TrainState, averaged, make_step, make_steps
from mi_jax.train.turns import Turn, turn_at, turns_of

MOST_SKIPPED = 10
"""Steps in a row without a finite loss and gradient that end a run."""


def train(config: TrainConfig, out_dir: str | pathlib.Path) -> TrainState:
    """Trains `config.objective` for `config.steps` steps; goes on from the newest whole checkpoint in `out_dir`,
    if there is one.

    Writes under `out_dir`: config.json, checkpoints/, tensorboard/, metrics.csv. A run that was killed and started
    again ends with the same bits as one that was not: the state holds the key, the checkpoint the place in the data.
    SIGTERM, which schedulers send before they take a machine back, ends a run after the step under way, with a
    checkpoint. With `config.on_device` all of this holds for calls of several steps.

    Raises:
      SystemExit: of code 143, after a SIGTERM.
      InputError: `out_dir` cannot be written, another run has it, or it holds checkpoints of another config, or none
        that is whole; the dataset ends, or its batch does not divide over the devices; what samples need is not there;
        there is no pool to train from on the device, or it does not fit; ten steps in a row were skipped.
    """
    mesh, out_dir = make_mesh(seq=config.seq), pathlib.Path(out_dir)
    with on_mesh(mesh), _run_folder(out_dir):
        return _train(config, out_dir, mesh)


@contextlib.contextmanager
def _run_folder(out_dir: pathlib.Path) -> Iterator[None]:
    """The folder of a run, which no other run writes to meanwhile. One that is new, and in which nothing was trained
    before the run failed, is not left behind."""
    if jax.process_index():
        yield
        return
    new = not out_dir.exists()
    with contextlib.ExitStack() as held:
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(out_dir, "a training"))
        except OSError as error:
            raise InputError(f"{out_dir}: cannot be written ({error.strerror or error})") from None
        try:
            yield
        except InputError:
            trained = (out_dir / "metrics.csv").exists() or any((out_dir / ckpt.FOLDER).glob("[0-9]*"))
            if new and not trained:
                shutil.rmtree(out_dir, ignore_errors=True)
            raise


def _train(config: TrainConfig, out_dir: pathlib.Path, mesh: Mesh) -> TrainState:
    objective = config.objective
    chief = jax.process_index() == 0
    check_pool(config)
    shows = bool(config.sample_every) and hasattr(objective, "shows") and objective.shows()

    # --- Checkpoints: go on where the newest whole one stands
    checkpoints = ckpt.open_checkpoints(out_dir, config.keep)
    state, (graph, frozen), place = start(config, mesh, checkpoints, out_dir)
    first = int(jax.device_get(state.step))
    programs = {
        turn.name: (make_steps if config.on_device else make_step)(config, graph, turn) for turn in turns_of(objective)
    }
    if chief:
        keep_config(config, out_dir)

    # --- Data
    # Grain's worker processes ask absl for flags, which only an absl program has parsed.
    if not absl.flags.FLAGS.is_parsed():
        absl.flags.FLAGS.mark_as_parsed()
    share, shares = share_of_batch(mesh)
    dataset = objective.dataset(config.seed, share, shares)
    indexed = isinstance(dataset, grain.MapDataset)
    show = None
    if shows:
        show = sampler(config, graph, to_devices(dataset[0] if indexed else next(iter(dataset)), mesh, shares))
    pool = iterator = None
    if config.on_device:
        pool, kinds = pool_on(mesh, objective), objective.kinds()
    else:
        iterator = _read_ahead(dataset, config.workers, first, place)
    by_step = indexed or config.on_device  # the step alone says where to go on
    notes = {"frozen": fingerprint_of(frozen)}

    # --- The loop. It reads a call's numbers only after the next one is under way, so the devices never wait for the
    # log. A call is one step, or several of one turn, up to the next multiple of `on_device`.
    log = RunLog(out_dir, config.name, first, config.steps) if chief else None
    pending, interval, clock, streak = [], [], None, 0
    try:
        with _sigterm() as asked_to_stop:
            each = config.on_device or 1
            done = first
            for calls in itertools.count(1):
                if (step := done) >= config.steps:
                    break
                turn, end = turn_at(objective, step), min((step // each + 1) * each, config.steps)
                done = next((k for k in range(step + 1, end) if turn_at(objective, k) != turn), end)
                if pool is None:
                    arguments = (to_devices(_next(iterator, step), mesh, shares),)
                else:
                    arguments = pool, kind_of_call(config.seed, step // each, kinds), done - step
                with jax.transfer_guard_host_to_device("disallow"):
                    state, metrics = programs[turn.name](state, frozen, *arguments)
                last, stop = done == config.steps, asked_to_stop(calls)
                saving = _due(config.checkpoint_every, step, done) or last or stop
                clock = clock or (done, time.perf_counter())  # from here on: compiling is not speed
                pending.append((step, done, turn.name, metrics))

                # What a checkpoint holds is logged before: a run that goes on from it has the whole log.
                while len(pending) > (0 if saving else 1):
                    before, count, name, values = pending.pop(0)
                    rows = _each_step(jax.device_get(values))
                    interval += [(name, row) for row in rows]
                    streak = _skipped_in_a_row(streak, rows)
                    if log:
                        log.progress(count - before)
                    if _due(config.log_every, before, count) or count == config.steps:
                        now = time.perf_counter()
                        speed = (count - clock[0]) / (now - clock[1])
                        if log:
                            log.scalars(count, summarise(interval) | {"steps_per_second": speed})
                        interval, clock = [], (count, now)
                    if streak >= MOST_SKIPPED:
                        latest = checkpoints.latest
                        kept = f"the checkpoint of step {latest.step} stays" if latest else "there is no checkpoint"
                        raise InputError(
                            f"{out_dir}: the last {streak} steps up to {count} were skipped, for their loss or "
                            f"gradient was not finite; {kept}"
                        )

                if saving:
                    data = {"batches": done} if by_step else iterator.get_state()
                    ckpt.save(checkpoints, done, state, notes | {"data": data})
                if show and (_due(config.sample_every, step, done) or last):
                    samples = show(averaged(state), frozen, done)  # all processes take part in it
                    if log:
                        log.samples(done, samples())
                if stop and not last:
                    raise SystemExit(128 + signal.SIGTERM)
    finally:
        with contextlib.ExitStack() as ends:  # each, whatever becomes of those before; the last first
            if log:
                ends.callback(log.close)
            if hasattr(iterator, "close"):
                ends.callback(iterator.close)  # ends Grain's processes
            ends.callback(ckpt.close, checkpoints)  # a checkpoint under way is finished
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


def _skipped_in_a_row(streak: int, rows: list[dict[str, float]]) -> int:
    """How many steps were skipped in a row, up to the last of `rows`, before which `streak` were. A step that was
    skipped has a loss or a gradient that is not finite."""
    for row in rows:
        finite = math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])
        streak = 0 if finite else streak + 1
    return streak


def summarise(interval: list[tuple[str, dict[str, float]]]) -> dict[str, float]:
    """Means over an interval's finite values, and the last one of what is a state rather than a measurement, of (turn,
    numbers of a step). With several turns all but the count of skipped steps are named by turn: "critic/loss"."""
    columns: dict[str, list[float]] = {}
    for turn, row in interval:
        for name in sorted(row, key=lambda name: (name != "loss", name)):
            label = f"{turn}/{name}" if turn != Turn().name and name != "skipped" else name
            columns.setdefault(label, []).append(row[name])
    summary = {}
    for label in sorted(columns, key=lambda label: (label.rpartition("/")[2] != "loss", label)):
        values = columns[label]
        finite = [value for value in values if math.isfinite(value)]
        if label.rpartition("/")[2] in ("skipped", "learning_rate"):
            summary[label] = values[-1]
        else:
            summary[label] = sum(finite) / len(finite) if finite else math.nan
    return summary


def _next(iterator: Any, step: int) -> dict[str, Any]:
    try:
        return next(iterator)
    except StopIteration:
        raise InputError(f"the dataset ends after {step} batches; a training set repeats without end") from None
