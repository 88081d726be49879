"""Objectives that train several parts in turn."""

import csv
import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mi_jax.errors import InputError
from mi_jax.mesh import gather_parameters, make_mesh
from mi_jax.train.checkpoints import load_ema, load_ema_state, named_leaves
from mi_jax.train.loop import train
from mi_jax.train.objective import TrainConfig
from mi_jax.train.state import init_state, make_step, split_model
from mi_jax.train.turns import OptimizerConfig, Turn, turn_at, turns_of

TURNS = ("critic", "student")
STUDENT = OptimizerConfig(learning_rate=0.1)
CRITIC = OptimizerConfig(learning_rate=0.05, ema_decay=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A student that follows a frozen teacher, and a critic that follows the student: five steps of it to one."""

    student: OptimizerConfig = STUDENT
    critic: OptimizerConfig = CRITIC
    both: bool = False

    def init(self, key):
        layers = {
            name: nnx.Linear(3, 2, rngs=nnx.Rngs(k)) for name, k in zip((*TURNS, "teacher"), jax.random.split(key, 3))
        }
        layers["teacher"].kernel.set_value(layers["teacher"].kernel[...].astype(jnp.bfloat16))
        return nnx.Dict(**layers)

    @property
    def turns(self):
        return tuple(
            Turn(name=name, trains=lambda path, name=name: path[0] == name or self.both, optimizer=getattr(self, name))
            for name in TURNS
        )

    def turn(self, step):
        return "student" if step % 6 == 5 else "critic"

    def dataset(self, seed, share=0, shares=1):
        return (
            grain.MapDataset.range(64)
            .seed(seed)
            .repeat()
            .random_map(lambda i, rng: {"x": rng.normal(size=(8, 3)).astype(np.float32)})
        )

    def loss(self, model, batch, key, turn, step):
        model = gather_parameters(model)
        kernels = {name: model[name].kernel[...].astype(jnp.float32) for name in (*TURNS, "teacher")}
        goal = kernels["teacher"] if turn == "student" else jax.lax.stop_gradient(kernels["student"])
        error = jnp.square(batch["x"] @ (kernels[turn] - goal)).mean(1)
        return error, {"batch": jnp.mean(batch["x"])}

    def pool(self):
        return {"x": np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)}

    def kinds(self):
        return (1.0,)

    def draw(self, pool, key, kind):
        return {"x": pool["x"][jax.random.randint(key, (8,), 0, 64)]}


def config(objective=None, **changes):
    base = {"steps": 12, "checkpoint_every": 3, "log_every": 3, "sample_every": 0}
    optimizer = OptimizerConfig(learning_rate=1.0)
    return TrainConfig(name="test", objective=objective or Pair(), optimizer=optimizer, **base | changes)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr("mi_jax.train.loop.make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))


def bits(tree):
    return {name: np.asarray(leaf).tobytes() for name, leaf in named_leaves(tree).items()}


def test_a_turn_moves_its_own_leaves_alone_bit_for_bit():
    settings = config()
    graph, params, frozen = split_model(settings.objective.init(jax.random.key(0)), settings.objective)
    state = init_state(settings, params, jax.random.key(1))
    assert set(state.params) == set(TURNS)
    assert set(state.ema) == {"student"}  # the critic keeps none
    batch = {"x": jnp.ones((8, 3))}
    for turn in turns_of(settings.objective):
        before = bits(state)
        state, _ = make_step(settings, graph, turn)(state, frozen, batch)
        moved = {name for name, leaf in bits(state).items() if leaf != before[name]}
        of = {name.split(".")[1] for name in moved if "." in name}
        assert of == {turn.name}
        assert {f"params.{turn.name}.{turn.name}.kernel", "step"} <= moved


def test_each_turn_has_its_own_rate_and_frozen_parts_keep_their_dtype(tmp_path):
    state = train(config(), tmp_path)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["3", "6", "9", "12"]
    assert {float(row["critic/learning_rate"]) for row in rows} == {0.05}
    assert [row["student/learning_rate"] for row in rows] == ["", "0.1", "", "0.1"]
    assert {row["skipped"] for row in rows} == {"0"}
    teacher = load_ema(tmp_path, Pair())["teacher"].kernel[...]
    assert teacher.dtype == jnp.bfloat16
    averages, critic = load_ema_state(tmp_path), load_ema_state(tmp_path, "critic")
    np.testing.assert_array_equal(averages["student"]["kernel"][...], state.ema["student"]["student"]["kernel"][...])
    np.testing.assert_array_equal(critic["critic"]["kernel"][...], state.params["critic"]["critic"]["kernel"][...])
    assert set(critic) == {"critic"}
    with pytest.raises(InputError, match="holds no turn 'teacher'"):
        load_ema_state(tmp_path, "teacher")


def test_a_run_cut_in_the_middle_of_a_cycle_ends_with_the_same_bits(tmp_path):
    whole = train(config(), tmp_path / "whole")
    train(config(steps=9), tmp_path / "cut")
    assert bits(train(config(), tmp_path / "cut")) == bits(whole)


def test_calls_of_several_steps_end_where_the_turn_does(tmp_path):
    """On the device as on the host, the critic takes 5 of 6 steps, and no call mixes turns."""
    objective = Pair()
    assert [turn_at(objective, k).name for k in range(12)] == (["critic"] * 5 + ["student"]) * 2
    longer = train(config(on_device=4), tmp_path / "four")
    np.testing.assert_array_equal(longer.opt_state["critic"][1].count, 10)
    np.testing.assert_array_equal(longer.opt_state["student"][1].count, 2)
    single = train(config(on_device=1), tmp_path / "one")
    for ours, theirs in zip(jax.tree.leaves(longer), jax.tree.leaves(single), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_no_parameter_is_trained_twice():
    with pytest.raises(ValueError, match=r"critic\.bias is trained by critic and student"):
        split_model(Pair().init(jax.random.key(0)), Pair(both=True))


def test_the_optimisers_fields_are_checked():
    with pytest.raises(InputError, match="warmup_steps is -1, must lie in"):
        OptimizerConfig(learning_rate=1.0, warmup_steps=-1)
    with pytest.raises(InputError, match=r"ema_decay is 1\.5, must lie in"):
        OptimizerConfig(learning_rate=1.0, ema_decay=1.5)
