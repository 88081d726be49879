import collections
import dataclasses
import io
import itertools
import json
import os
import pathlib
import resource
import signal
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tiny_training import Regression, config, digests, rows

from mi_jax.errors import InputError
from mi_jax.mesh import make_mesh
from mi_jax.train.checkpoints import load_ema, load_ema_state, named_leaves
from mi_jax.train.logging import RunLog, encode_gif, encode_png
from mi_jax.train.loop import to_devices, train
from mi_jax.train.objective import load_config
from mi_jax.train.state import init_state, make_step, split_model
from mi_jax.train.turns import OptimizerConfig


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """The laws do not depend on the mesh, and one device compiles faster; `monkeypatch.undo()` gives all 8 back."""
    monkeypatch.setattr("mi_jax.train.loop.make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config, folder, state) of a run that is done. Nothing may change the folder."""
    settings, out = config(steps=20, keep=2, sample_every=10), tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mi_jax.train.loop.make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))
        return settings, out, train(settings, out)


# --- Resuming


def killed_run(out_dir):
    """Dies at step 60, while the checkpoint of step 60 is being written."""
    objective = Regression(die=not (pathlib.Path(out_dir) / "checkpoints").exists())
    return config(
        objective, steps=100, checkpoint_every=20, sample_every=60, decay_fraction=0.5, warmup_steps=10, workers=1
    )


def test_resumed_after_sigkill_is_bitwise_the_unbroken_run(tmp_path):
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    run, environment = [sys.executable, __file__], os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    first = subprocess.run([*run, str(broken)], env=environment, capture_output=True, text=True)
    assert first.returncode == -signal.SIGKILL, first.stderr
    saved = {int(p.name) for p in (broken / "checkpoints").iterdir() if p.name.isdigit()}
    assert max(saved) in (40, 60)  # 60 only where its write was done in time

    (unbroken / "checkpoints").mkdir(parents=True)  # so that it lives on
    second = subprocess.run([*run, str(broken), str(unbroken)], env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    resumed, whole = second.stdout.splitlines()
    assert resumed.startswith("step 100 ")
    assert resumed == whole
    # The log reads as one run, too: no row twice, none missing, the same numbers (but for the speed).
    logged = [{k: v for k, v in row.items() if k != "steps_per_second"} for row in rows(broken)]
    assert [int(row["step"]) for row in logged] == list(range(4, 101, 4))
    expected = [{k: v for k, v in row.items() if k != "steps_per_second"} for row in rows(unbroken)]
    cut = next(i for i, row in enumerate(logged) if int(row["step"]) > max(saved) + 4)
    assert logged[cut:] == expected[cut:]


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
def test_a_run_goes_on_with_another_number_of_workers(tmp_path, before, after):
    """Bit for bit: the step says which batch comes next."""
    whole = train(config(steps=8, checkpoint_every=4, decay_fraction=0.0, workers=0), tmp_path / "whole")
    for steps, workers in ((4, before), (8, after)):
        settings = config(steps=steps, checkpoint_every=4, decay_fraction=0.0, workers=workers)
        state = train(settings, tmp_path / "run")
    assert digests(state) == digests(whole)


def test_sigterm_ends_a_run_with_a_checkpoint_after_the_step_under_way(tmp_path, finished):
    settings, _, whole = finished
    before = signal.getsignal(signal.SIGTERM)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Preempted(Regression):
        def sample(self, model, batch, key):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().sample(model, batch, key)

    with pytest.raises(SystemExit) as stop:
        train(dataclasses.replace(settings, objective=Preempted(), sample_every=7), tmp_path)
    assert stop.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    # Sent after step 7, seen by step 8, at which the run is gone on with.
    assert max(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == 8
    assert digests(train(settings, tmp_path)) == digests(whole)


def test_a_checkpoint_of_another_config_is_refused_in_one_line(finished):
    _, out, _ = finished
    with pytest.raises(InputError, match=r"checkpoints/20: .*of another shape \(the first is") as error:
        train(config(Regression(width=8), steps=24), out)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="unknown"):
        train(config(Regression(frozen="outer"), steps=24), out)


def test_a_finished_run_is_left_as_it_is(finished):
    settings, out, state = finished
    before = (out / "metrics.csv").read_bytes()
    assert digests(train(settings, out)) == digests(state)
    assert (out / "metrics.csv").read_bytes() == before


# --- The step


def test_params_and_ema_equal_optax_adamw_by_hand_over_8_devices(tmp_path, monkeypatch):
    """The trainer runs on a mesh of 8; the reference is a plain loop on one device."""
    monkeypatch.undo()
    objective = Regression(width=64, noise=0.0)
    settings = config(
        objective, steps=6, warmup_steps=2, decay_fraction=0.5, clip_norm=0.3, weight_decay=0.1, ema_decay=0.2, b2=0.95
    )
    state = train(settings, tmp_path)
    assert len(jax.devices()) == 8
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))

    init_key, _ = jax.random.split(jax.random.key(0))
    graph, params, rest = split_model(objective.init(init_key), objective)
    params = params["model"]
    rates = jnp.asarray([0.5e-2, 1e-2, 1e-2, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3])
    tx = optax.chain(optax.clip_by_global_norm(0.3), optax.adamw(lambda k: rates[k], b1=0.9, b2=0.95, weight_decay=0.1))
    opt_state, ema = tx.init(params), params

    @jax.jit
    def reference_step(params, opt_state, ema, batch, decay):
        loss = lambda p: objective.loss(nnx.merge(graph, p, rest), batch, jax.random.key(0), "model", 0)[0].mean()  # noqa: E731
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)

    for step, batch in enumerate(itertools.islice(objective.dataset(0), 6)):
        decay = min(0.2, (1 + step) / (10 + step))
        batch = {"x": batch["x"], "y": batch["y"]}
        params, opt_state, ema = reference_step(params, opt_state, ema, batch, decay)
    for ours, reference in ((state.params["model"], params), (state.ema["model"], ema)):
        for name, leaf in named_leaves(reference).items():
            np.testing.assert_allclose(named_leaves(ours)[name], leaf, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("seq", [None, 2])
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, monkeypatch, seq):
    """On one device, and on 4 x 2, where each device splits its own rows."""
    if seq:
        monkeypatch.undo()
    objective = Regression(batch=16, noise=0.0)
    whole = train(config(objective, steps=3, seq=seq or 1), tmp_path / "whole")
    parts = train(config(objective, steps=3, seq=seq or 1, accumulate=2), tmp_path / "parts")
    for ours, theirs in zip(jax.tree.leaves(parts.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
    for ours, theirs in zip(rows(tmp_path / "parts"), rows(tmp_path / "whole"), strict=True):
        np.testing.assert_allclose(float(ours["grad_norm"]), float(theirs["grad_norm"]), rtol=1e-4)
    with pytest.raises(InputError, match=r"accumulate is 3, which does not divide the \d+ examples"):
        train(config(objective, steps=3, accumulate=3), tmp_path / "odd")


def test_learning_rate_warms_up_stays_flat_and_decays():
    changing = OptimizerConfig(learning_rate=2.0, warmup_steps=4, decay_fraction=0.4)
    expected = {0: 0.5, 3: 2.0, 4: 2.0, 60: 2.0, 80: 1.0, 99: 0.05, 100: 0.0}
    assert {k: pytest.approx(float(changing.rate(k, 100))) for k in expected} == expected
    constant = OptimizerConfig(learning_rate=2.0)
    assert float(constant.rate(0, 100)) == float(constant.rate(99, 100)) == 2.0


@pytest.fixture(scope="module")
def compiled():
    """(mesh of one device, step function) of the default config."""
    mesh = make_mesh(devices=jax.devices()[:1])
    graph, _, _ = split_model(Regression().init(jax.random.key(1)), Regression())
    return mesh, make_step(config(), graph)


@pytest.fixture
def single(compiled):
    """(mesh, state, frozen, step function) as the trainer sets them up, on one device."""
    mesh, step = compiled
    with jax.set_mesh(mesh), jax.remove_size_one_mesh_axis_from_type(True):
        _, params, frozen = split_model(Regression().init(jax.random.key(1)), Regression())
        yield mesh, init_state(config(), params, jax.random.key(2)), frozen, step


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(single):
    mesh, state, frozen, step = single
    batches = iter(Regression(poisoned=(1,)).dataset(0))
    state, metrics = step(state, frozen, to_devices(next(batches), mesh))
    assert int(metrics["skipped"]) == 0
    before = digests(state)
    state, metrics = step(state, frozen, to_devices(next(batches), mesh))
    after = digests(state)
    assert not np.isfinite(metrics["loss"])
    assert {name for name in before if before[name] != after[name]} == {"step", "skipped"}
    assert (int(state.step), int(state.skipped)) == (2, 1)
    state, _ = step(state, frozen, to_devices(next(batches), mesh))
    assert digests(state)["params.model.inner.kernel"] != after["params.model.inner.kernel"]
    assert int(state.skipped) == 1


def test_skipped_steps_stay_out_of_the_logged_means(tmp_path):
    state = train(config(Regression(poisoned=(2, 5)), steps=8), tmp_path)
    assert int(state.skipped) == 2
    assert [row["skipped"] for row in rows(tmp_path)] == ["1", "2"]
    assert all(0 < float(row["loss"]) < 10 for row in rows(tmp_path))


def test_each_window_length_compiles_once(single):
    mesh, state, frozen, step = single
    step.clear_cache()
    for batch in itertools.islice(Regression(lengths=(4, 7)).dataset(0), 6):
        state, _ = step(state, frozen, to_devices(batch, mesh))
    assert step._cache_size() == 2
    assert int(state.skipped) == 0


def test_the_same_key_gives_other_noise_at_each_step(single):
    mesh, state, frozen, step = single
    batch = to_devices(next(iter(Regression().dataset(0))), mesh)
    key = np.asarray(state.key)
    losses = []
    for _ in range(3):
        params = jax.tree.map(jnp.copy, state.params)
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        state = dataclasses.replace(state, params=params)
    assert len(set(losses)) == 3
    assert np.array_equal(state.key, key)


def test_frozen_parameters_keep_their_bits_and_are_not_stored(tmp_path, monkeypatch):
    monkeypatch.undo()  # all 8 devices: frozen parameters are spread, too, and gathered for the loss and the sample
    objective = Regression(frozen="inner", width=64)
    state = train(config(objective, steps=3, sample_every=3), tmp_path)
    assert {name.split(".")[0] for name in named_leaves(state.params["model"])} == {"outer"}
    model = load_ema(tmp_path, objective)
    start = objective.init(jax.random.split(jax.random.key(0))[0])
    assert np.array_equal(model["inner"].kernel[...], start["inner"].kernel[...])
    assert not np.array_equal(model["outer"].kernel[...], start["outer"].kernel[...])


def test_bfloat16_reaches_the_loss_while_the_masters_stay_float32(tmp_path):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Probe(Regression):
        def loss(self, model, batch, key, turn, step):
            assert model["inner"].kernel.dtype == jnp.bfloat16
            return super().loss(model, batch, key, turn, step)

    state = train(config(Probe(), compute_dtype="bfloat16", learning_rate=1e-5), tmp_path)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema))} == {jnp.dtype("float32")}
    start = Regression().init(jax.random.split(jax.random.key(0))[0])["inner"].kernel[...]
    moved = np.abs(np.asarray(state.params["model"]["inner"]["kernel"][...] - start))
    assert 0 < moved.max() < 2e-4  # steps far below bfloat16's resolution add up


# --- What a run leaves


def test_load_ema_returns_the_averaged_parameters(finished, tmp_path):
    _, out, state = finished
    averaged = named_leaves(state.ema["model"])
    for loaded in (load_ema_state(out), nnx.state(load_ema(out, Regression()))):
        assert digests(loaded) == {name: digests(averaged)[name] for name in averaged}
    with pytest.raises(InputError, match="of another shape"):
        load_ema(out, Regression(width=4))
    with pytest.raises(InputError, match="no finished checkpoint"):
        load_ema_state(tmp_path)


def test_a_run_keeps_its_last_checkpoints_config_and_samples(finished):
    _, out, _ = finished
    assert sorted(int(p.name) for p in (out / "checkpoints").iterdir()) == [15, 20]
    assert json.loads((out / "config.json").read_text())["objective"]["width"] == 16
    events = b"".join(p.read_bytes() for p in (out / "tensorboard").iterdir())
    assert events.count(b"samples/picture") == 2
    assert events.count(b"train/loss") == 5


def test_a_dataset_that_ends_is_the_users_fault(tmp_path):
    with pytest.raises(InputError, match="ends after 1 batches"):
        train(config(Regression(batches=1)), tmp_path)


def test_a_batch_that_does_not_divide_over_the_devices_is_the_users_fault(tmp_path, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(InputError, match="does not divide over data=8"):
        train(config(Regression(batch=6)), tmp_path)


def test_an_output_folder_that_cannot_be_written_is_the_users_fault(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        train(config(), tmp_path / "file" / "run")


# --- Logs and configs


def test_samples_are_stored_as_they_were_drawn():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (5, 7, 3), np.uint8)
    stored = encode_png(picture)
    assert (stored.height, stored.width) == (5, 7)
    assert np.array_equal(Image.open(io.BytesIO(stored.encoded_image_string)), picture)

    video = np.repeat(np.repeat(rng.integers(0, 256, (3, 2, 2, 3), np.uint8), 8, 1), 8, 2)
    gif = Image.open(io.BytesIO(encode_gif(video).encoded_image_string))
    assert (gif.n_frames, gif.info["duration"]) == (3, 40)
    for i, frame in enumerate(video):
        gif.seek(i)
        assert np.abs(np.asarray(gif.convert("RGB"), int) - frame).max() <= 2


def events_of(path: pathlib.Path) -> list[Event]:
    """The records of a TensorBoard file: each has its length, a checksum of that, itself, and a checksum."""
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert events[0].file_version == "brain.Event:2"
    return events


def test_numbers_among_samples_are_scalars_and_the_bar_bears_the_runs_name(tmp_path, capsys):
    log = RunLog(tmp_path, "my run", 0, 10)
    log.samples(3, {"ratio": 0.5, "picture": np.zeros((4, 4, 3), np.uint8)})
    log.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    values = {value.tag: value for event in events_of(path) for value in event.summary.value}
    assert values["samples/ratio"].simple_value == 0.5
    assert values["samples/picture"].image.height == 4
    assert "my run:" in capsys.readouterr().err


def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path):
    log = RunLog(tmp_path, "test", 0, 10)
    for step in (2, 4, 6):
        log.scalars(step, {"loss": step / 2})
    log.close()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("8,")  # cut short by a kill
    log = RunLog(tmp_path, "test", 4, 10)
    log.scalars(6, {"loss": 9.0})
    log.close()
    assert [(row["step"], float(row["loss"])) for row in rows(tmp_path)] == [("2", 1.0), ("4", 2.0), ("6", 9.0)]
    first, second = (events_of(path) for path in sorted((tmp_path / "tensorboard").iterdir()))
    assert [(e.step, e.summary.value[0].simple_value) for e in first[1:]] == [(2, 1.0), (4, 2.0), (6, 3.0)]
    # TensorBoard drops what it has of step 5 and later where a session starts.
    assert [(e.step, e.session_log.status) for e in second[1:2]] == [(5, SessionLog.START)]
    assert [(e.step, e.summary.value[0].tag, e.summary.value[0].simple_value) for e in second[2:]] == [
        (6, "train/loss", 9.0)
    ]


def test_a_log_that_finds_no_room_ends_in_a_line_and_does_not_wait(tmp_path):
    """However many lines: a queue of ten that nobody empties is how trainings waited for ever."""
    log = RunLog(tmp_path, "test", 0, 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"tensorboard: cannot be written \(File too large\)"):
            collections.deque(log.scalars(step, {"a" * 100: 1.0, "loss": 1.0}) for step in range(100))
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_config_files_take_overrides(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(
        f"import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parents[1])!r})\n"
        "from tiny_training import OptimizerConfig, Regression, TrainConfig\n"
        "config = TrainConfig(name='e', objective=Regression(width=12), steps=5,\n"
        "                     optimizer=OptimizerConfig(learning_rate=0.5))\n"
    )
    plain = load_config(path)
    assert (plain.steps, plain.objective.width, plain.optimizer.learning_rate) == (5, 12, 0.5)
    changed = load_config(path, ["--steps", "7", "--objective.width", "3", "--compute-dtype", "bfloat16"])
    assert (changed.steps, changed.objective.width, changed.compute_dtype, changed.name) == (7, 3, "bfloat16", "e")
    with pytest.raises(SystemExit) as exit_:
        load_config(path, ["--no-such-option", "1"])
    assert exit_.value.code == 2


def test_config_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"missing\.py: no such config file"):
        load_config(tmp_path / "missing.py")
    (tmp_path / "empty.py").write_text("steps = 5\n")
    with pytest.raises(InputError, match=r"empty\.py: defines no TrainConfig named `config`"):
        load_config(tmp_path / "empty.py")
    with pytest.raises(InputError, match="steps is 0, must lie in"):
        config(steps=0)


if __name__ == "__main__":
    for out in sys.argv[1:]:
        final = train(killed_run(out), out)
        print("step", int(final.step), " ".join(digests(final).values()))
