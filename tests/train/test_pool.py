"""Training from a pool in device memory: several steps a call, the same steps, and the same again after a kill."""

import csv
import dataclasses
import hashlib
import os
import pathlib
import signal
import subprocess
import sys

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mi_jax.commands.train import train as command
from mi_jax.errors import InputError
from mi_jax.mesh import gather_parameters, make_mesh, spec_of
from mi_jax.train.checkpoints import named_leaves
from mi_jax.train.loop import train
from mi_jax.train.objective import TrainConfig, load_config
from mi_jax.train.pool import kind_of_call, pool_on
from mi_jax.train.state import draw_key, init_state, make_step, make_steps, split_model
from mi_jax.train.turns import OptimizerConfig

KINDS = (8, 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Points:
    """A line through points of a pool; batches of 8 or 16 of them, noise in the loss. Few operations, for its programs
    are compiled often."""

    signal: int = 0  # that the run gets at its first sample

    def init(self, key):
        return nnx.Linear(3, 16, rngs=nnx.Rngs(params=key))

    def dataset(self, seed, share=0, shares=1):
        return grain.MapDataset.range(8).repeat().map(lambda i: {"x": np.zeros((8, 3), np.float32)})

    def pool(self):
        x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
        return {"x": x, "y": np.sin(x.sum(1))}

    def kinds(self):
        return 3.0, 1.0

    def draw(self, pool, key, kind):
        first = (jax.random.bits(key) % np.uint32(30)).astype(jnp.int32)
        batch = {name: jax.lax.dynamic_slice_in_dim(x, first, KINDS[kind]) for name, x in pool.items()}
        return batch if spec_of(first) is None else jax.reshard(batch, P("data"))

    def loss(self, model, batch, key, turn, step):
        guess = gather_parameters(model)(batch["x"]).mean(1) + 0.1 * jax.random.uniform(key)
        return jnp.square(guess - batch["y"]), {"rows": jnp.float32(len(guess))}

    def shows(self):
        return True

    def sample(self, model, batch, key):
        return {}

    def show(self, sampled):
        if self.signal:
            os.kill(os.getpid(), self.signal)
        return {}


def config(objective=None, learning_rate=1e-2, warmup_steps=0, **changes):
    base = {"steps": 14, "seed": 7, "checkpoint_every": 5, "log_every": 6, "sample_every": 0, "on_device": 4}
    optimizer = OptimizerConfig(learning_rate=learning_rate, warmup_steps=warmup_steps)
    return TrainConfig(name="test", objective=objective or Points(), optimizer=optimizer, **base | changes)


def digests(state):
    return {name: hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for name, leaf in named_leaves(state).items()}


def rows(out):
    with (out / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if k != "steps_per_second"} for row in csv.DictReader(file)]


def checkpoints(out):
    return sorted(int(p.name) for p in (out / "checkpoints").iterdir() if p.name.isdigit())


def alone(**_):
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr("mi_jax.train.loop.make_mesh", alone)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """(folder, state) of a run of 14 steps, 4 a call."""
    out = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mi_jax.train.loop.make_mesh", alone)
        return out, train(config(), out)


# --- The call


def test_steps_of_one_call_are_single_steps_on_the_same_draws():
    settings, objective = config(accumulate=2, warmup_steps=3), Points()
    pool = jax.tree.map(jnp.asarray, objective.pool())
    graph, params, frozen = split_model(objective.init(jax.random.key(1)), objective)
    start = lambda: init_state(settings, jax.tree.map(jnp.copy, params), jax.random.key(2))  # noqa: E731
    together, metrics = make_steps(settings, graph)(start(), frozen, pool, 1, 5)
    state, step, singly = start(), make_step(settings, graph), []
    for _ in range(5):
        state, told = step(state, frozen, objective.draw(pool, draw_key(state), 1))
        singly.append(told)
    assert int(together.step) == 5
    for name, values in metrics.items():
        np.testing.assert_allclose(values, [float(told[name]) for told in singly], rtol=1e-6, err_msg=name)
    assert len(set(np.asarray(metrics["loss"]).tolist())) == 5
    for ours, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_no_draw_shares_its_key_with_a_loss():
    """As keys: of 6 steps' draws and losses, and of what the loss may fold and split from its own."""
    params = {"model": {"x": jnp.zeros(1)}}
    state = init_state(config(), params, jax.random.key(2))
    keys = []
    for step in range(6):
        at = dataclasses.replace(state, step=jnp.int32(step))
        loss = jax.random.fold_in(jax.random.wrap_key_data(state.key), step)
        keys += [draw_key(at), loss, *jax.random.split(loss, 3)]
    assert len({jax.random.key_data(key).tobytes() for key in map(jax.device_get, keys)}) == 6 * 5


# --- The run


def test_calls_end_at_their_multiples_and_at_the_last_step(unbroken):
    out, state = unbroken
    assert int(state.step) == 14
    # Every 6 steps a log line, every 5 a checkpoint (the last 2 stay), each at the end of the call it falls into.
    assert [row["step"] for row in rows(out)] == [8, 12, 14]
    assert checkpoints(out) == [12, 14]
    # Calls of 4, 4, 4 and 2 steps, each of one kind, that the seed and the call's number give.
    size = np.repeat([KINDS[kind_of_call(7, call, (3.0, 1.0))] for call in range(4)], 4)[:14]
    assert [row["rows"] for row in rows(out)] == [size[a:b].mean() for a, b in ((0, 8), (8, 12), (12, 14))]
    assert set(size) == set(KINDS)


def test_kinds_come_in_their_shares():
    kinds = [kind_of_call(7, call, (3.0, 1.0)) for call in range(2000)]
    assert np.mean(kinds) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 2000) ** 0.5)
    assert kinds[:50] != [kind_of_call(8, call, (3.0, 1.0)) for call in range(50)]


def test_killed_and_resumed_is_bitwise_the_unbroken_run(tmp_path, unbroken):
    whole, state = unbroken
    alike = os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"
    }  # as here (conftest): the same program has the same bits
    first = subprocess.run([sys.executable, __file__, str(tmp_path)], env=alike, capture_output=True, text=True)
    assert first.returncode == -signal.SIGKILL, first.stderr
    assert checkpoints(tmp_path)
    assert max(checkpoints(tmp_path)) in (8, 12)  # 12 only where its write was done in time
    assert digests(train(config(), tmp_path)) == digests(state)
    assert rows(tmp_path) == rows(whole)
    assert digests(train(config(), tmp_path)) == digests(state)  # a finished run is left as it is


def test_a_longer_run_goes_on_with_the_same_draws(tmp_path, unbroken):
    """From step 6, in the middle of a call: a batch depends on the seed and its step alone."""
    train(config(steps=6), tmp_path)
    for ours, theirs in zip(*map(jax.tree.leaves, (train(config(), tmp_path), unbroken[1])), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_sigterm_ends_a_run_with_a_checkpoint_after_the_call_under_way(tmp_path):
    with pytest.raises(SystemExit) as stop:
        train(config(Points(signal=signal.SIGTERM), sample_every=3, checkpoint_every=100), tmp_path)
    assert stop.value.code == 128 + signal.SIGTERM
    assert checkpoints(tmp_path) == [8]  # sent after the call of step 3, seen by the next one


def test_a_run_on_eight_devices_is_the_run_on_one(tmp_path, monkeypatch):
    """The pool whole on each, rows and parameters spread."""
    one = train(config(steps=4), tmp_path / "one")
    monkeypatch.undo()
    eight = train(config(steps=4), tmp_path / "eight")
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(eight.params))
    for ours, theirs in zip(*map(jax.tree.leaves, (eight, one)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


# --- Refusals


def test_an_objective_without_a_pool_is_refused_in_one_line(tmp_path):
    class Poolless:
        init, dataset, loss = Points.init, Points.dataset, Points.loss

    with pytest.raises(InputError, match=r"test: --on-device is for objectives .* which Poolless has not") as fault:
        train(config(Poolless()), tmp_path / "run")
    assert "\n" not in str(fault.value)
    assert not (tmp_path / "run").exists()


def test_a_pool_that_does_not_fit_is_refused_with_its_size(monkeypatch):
    """50 points of 4 numbers of 4 bytes."""
    monkeypatch.setattr("mi_jax.train.pool.free_bytes", lambda devices: 800)
    assert pool_on(alone(), Points())["x"].shape == (50, 3)
    monkeypatch.setattr("mi_jax.train.pool.free_bytes", lambda devices: 799)
    with pytest.raises(InputError, match=r"takes 800 bytes of every device's memory, which has 799 left"):
        pool_on(alone(), Points())


def test_the_command_line_sets_it(tmp_path, capsys):
    path = tmp_path / "experiment.py"
    path.write_text(
        f"import sys; sys.path[:0] = [{str(pathlib.Path(__file__).parent)!r}]\n"
        "from test_pool import config\nconfig = config(on_device=0)\n"
    )
    assert load_config(path).on_device == 0
    assert load_config(path, ["--on-device", "10"]).on_device == 10
    with pytest.raises(InputError, match="on_device is -1, must lie in"):
        config(on_device=-1)
    with pytest.raises(SystemExit):
        load_config(path, ["--help"])
    assert "--on-device" in capsys.readouterr().out
    command(["--help"])
    assert "--on-device" in capsys.readouterr().out


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 1)
    train(config(Points(signal=signal.SIGKILL), sample_every=11), sys.argv[1])
