"""DMD2: whose leaves a turn moves, what each term of its losses says, and that it is the same on eight devices."""

import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from tiny_avatar import draw_weights
from tiny_records import TINY, record

from mi_jax.data.records import write_records
from mi_jax.errors import InputError
from mi_jax.mesh import make_mesh, on_mesh, shard_parameters
from mi_jax.models.dit import DiT
from mi_jax.train.adversarial import Discriminator
from mi_jax.train.checkpoints import at_start, named_leaves
from mi_jax.train.distillation import motion
from mi_jax.train.distribution_matching import matching_loss
from mi_jax.train.dmd2 import DMD2Objective, face_weights
from mi_jax.train.flow import adaptive_loss
from mi_jax.train.loop import train
from mi_jax.train.objective import TrainConfig
from mi_jax.train.schedules import Ramp
from mi_jax.train.state import init_state, make_step, split_model
from mi_jax.train.turns import OptimizerConfig
from mi_jax.train.windows import cut_window

SMALL = dataclasses.replace(TINY, double_depth=1, single_depth=2)
TEACHER = draw_weights(DiT, SMALL, 5)
ALWAYS = Ramp(start=1.0, end=1.0)


@pytest.fixture(autouse=True)
def teacher(monkeypatch):
    monkeypatch.setattr("mi_jax.train.checkpoints._averages_of", lambda run: nnx.state(TEACHER))


def objective(**changes) -> DMD2Objective:
    base = {"dit": SMALL, "records": "", "teacher": "run", "teacher_dtype": "float32", "critic_rank": 2}
    return DMD2Objective(**base | changes)


def batch(b: int = 2, t: int = 3, moving: bool = False) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    clips = [record(rng, moving=moving) for _ in range(b)]
    cut = [cut_window(clip, rng, length=t, mid_clip=0.5, speakers=1) for clip in clips]
    return {name: jnp.asarray(np.stack([window[name] for window in cut])) for name in cut[0]}


def settings(objective: DMD2Objective, **changes) -> TrainConfig:
    base = {"steps": 12, "optimizer": OptimizerConfig(learning_rate=1e-3), "log_every": 6, "sample_every": 0}
    return TrainConfig(name="dmd2", objective=objective, **base | changes)


def bits(tree) -> dict[str, bytes]:
    return {name: np.asarray(leaf).tobytes() for name, leaf in named_leaves(tree).items()}


FORMS = {
    "all weights, everything asked": {
        "gan": ALWAYS, "gan_taps": (("double", 0), ("single", 1)), "gan_r1": 1.0, "motion_floor": 0.9,
        "restore_norm": 1.0, "guidance_audio": 1.0, "adaptive_weight": 1.0,
    },
    "factors": {"student_rank": 2, "follow": 0.5},
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
def test_a_turn_moves_its_own_leaves_alone(form):
    told = objective(**FORMS[form])
    config = settings(told)
    graph, params, frozen = split_model(at_start(told, jax.random.key(0)), told)
    state = init_state(config, params, jax.random.key(1))
    state = dataclasses.replace(state, step=state.step + 4)
    assert set(params) == {"student", "critic"}
    assert "teacher" in frozen
    programs = {turn.name: make_step(config, graph, turn) for turn in told.turns}
    for k in (4, 5, 6):
        before, name = bits(state), told.turn(k)
        assert name == ("student" if k == 5 else "critic")
        state, metrics = programs[name](state, frozen, batch())
        assert all(np.isfinite(float(value)) for value in metrics.values())
        moved = {leaf for leaf, data in bits(state).items() if data != before[leaf]}
        assert {leaf.split(".")[1] for leaf in moved if "." in leaf} == {name}
        assert any(leaf.startswith(f"params.{name}.{name}.") for leaf in moved)
    if "gan" in FORMS[form]:
        assert any(leaf.startswith("params.critic.discriminator.") for leaf in moved)
        assert {"gan", "missing_motion"} <= set(programs["student"](state, frozen, batch())[1])


def test_a_student_of_factors_starts_as_the_teacher_and_has_no_weights_of_its_own():
    told = objective(student_rank=2)
    model = at_start(told, jax.random.key(0))
    given = batch()
    latents, sigma = given["latents"].astype(jnp.float32), jnp.asarray([0.3, 0.9])
    velocities = [
        np.asarray(jax.jit(model.denoiser(name))(latents, sigma, told.conditions(model.teacher, given)))
        for name in ("teacher", "student", "critic")
    ]
    for other in velocities[1:]:
        np.testing.assert_array_equal(other, velocities[0])
    _, params, _ = split_model(model, told)
    assert {path[-1] for part in params.values() for path, _ in nnx.to_flat_state(part)} == {"down", "up"}


def test_the_critic_comes_nearer_to_the_student_once_a_cycle():
    told = objective(student_rank=2, follow=0.25)
    _, params, _ = split_model(at_start(told, jax.random.key(0)), told)
    student = {"student": nnx.State({"student": params["critic"]["critic"]})}
    student = jax.tree.map(lambda x: x + 4, student)
    for step, nearer in ((0, 0.0), (5, 0.0), (6, 1.0), (7, 0.0), (12, 1.0)):
        after = told.after("critic", params["critic"], student, jnp.int32(step))
        for one, two in zip(jax.tree.leaves(after), jax.tree.leaves(params["critic"]), strict=True):
            np.testing.assert_allclose(one - two, nearer, atol=1e-6)
    assert told.after("student", params["student"], {}, jnp.int32(6)) is params["student"]


def test_the_weights_follow_their_ramps():
    ramp = Ramp(start=1.0, end=0.1, steps=90)
    np.testing.assert_allclose([float(ramp(k)) for k in (0, 45, 90, 900)], [1.0, 0.55, 0.1, 0.1], rtol=1e-6)
    assert float(Ramp(start=0.3, end=0.7)(0)) == pytest.approx(0.7)
    assert Ramp(start=0.0, end=0.0).is_zero


@pytest.mark.parametrize("moving", [False, True])
def test_the_face_weighs_as_in_the_adaptive_loss(moving):
    given = batch(moving=moving)
    assert given["face_mask"].ndim == (4 if moving else 3)
    made = given["latents"].astype(jnp.float32)
    gradient = jax.random.normal(jax.random.key(0), made.shape)
    face = given["face_mask"].astype(jnp.float32)
    weighed = matching_loss(made, gradient, face_weights(face, made))
    np.testing.assert_allclose(weighed, adaptive_loss(0.5 * jnp.square(gradient), face), rtol=1e-4)
    if not moving:
        repeated = jnp.repeat(face[:, None], made.shape[1], axis=1)
        np.testing.assert_allclose(face_weights(repeated, made), face_weights(face, made), rtol=1e-6)


def test_guidance_is_drawn_for_each_example_inside_its_band():
    told = objective(guidance_audio=2.0, guidance_text=0.5, guidance_spread=0.2, guidance_band=(0.3, 0.8))
    sigma = jnp.linspace(0.0, 1.0, 4000)
    seen = told.guidance(sigma, jax.random.key(0))
    inside = (np.asarray(sigma) >= 0.3) & (np.asarray(sigma) <= 0.8)
    audio, text = np.asarray(seen.audio), np.asarray(seen.text)
    assert not audio[~inside].any()
    assert audio[inside].mean() == pytest.approx(2.0, rel=0.02)
    assert audio[inside].std() == pytest.approx(0.4, rel=0.05)
    assert text.mean() == pytest.approx(0.5, rel=0.02)
    assert min(audio.min(), text.min()) >= 0
    assert abs(np.corrcoef(audio[inside], text[inside])[0, 1]) < 0.1
    assert objective().guidance(sigma, jax.random.key(0)).branches == 1  # no weight: one evaluation


def test_motion_is_none_where_nothing_moves():
    still = jnp.ones((2, 5, 3, 3, 4))
    np.testing.assert_array_equal(motion(still), 0)
    moving = still + jnp.arange(5.0).reshape(1, 5, 1, 1, 1)
    np.testing.assert_allclose(motion(moving), np.std(np.arange(5)), rtol=1e-6)


@pytest.mark.long
def test_on_eight_devices_it_is_what_it_is_on_one():
    """Both turns, with the discriminator and guidance."""
    forms = FORMS["all weights, everything asked"] | {"guidance_text": 0.5}
    told = objective(**forms)
    config = settings(told)
    graph, params, frozen = split_model(at_start(told, jax.random.key(0)), told)
    given = batch(8)

    def run(params, frozen, given):
        state = jax.jit(lambda p, key: init_state(config, p, key))(params, jax.random.key(1))
        numbers = []
        for turn in told.turns:
            state, metrics = make_step(config, graph, turn)(state, frozen, given)
            numbers.append({name: float(value) for name, value in sorted(metrics.items())})
        return numbers

    alone = run(params, frozen, given)
    mesh = make_mesh(data=4, seq=2)
    with jax.set_mesh(mesh):
        spread = jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, P("data"))), given)
        together = run(shard_parameters(params, mesh), shard_parameters(frozen, mesh), spread)
    for one, two in zip(alone, together, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            assert two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-5), name


def test_the_discriminator_counts_no_padding():
    """12 tokens over 8 devices are padded to 16; the mean logit is that of one device."""
    judge = Discriminator(SMALL, (("double", 0), ("single", 1)), 8, rngs=nnx.Rngs(0))
    judge.heads.fc2.bias[...] = jnp.asarray([[0.5], [1.5]])
    given, told = batch(1), objective()

    @jax.jit
    def run(judge, model, given, sigma):
        return judge(model, given["latents"].astype(jnp.float32), sigma, told.conditions(model, given))

    alone = run(judge, TEACHER, given, jnp.asarray([0.4]))
    assert abs(float(alone[0])) > 0.1
    mesh = make_mesh(data=1, seq=8)
    with on_mesh(mesh):
        spread = run(shard_parameters(judge, mesh), shard_parameters(TEACHER, mesh), given, jnp.asarray([0.4]))
    np.testing.assert_allclose(spread, alone, rtol=1e-4)


@pytest.mark.long
def test_killed_in_the_middle_of_a_cycle_it_ends_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("mi_jax.train.loop.make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))
    rng = np.random.default_rng(0)
    write_records(tmp_path / "records", [record(rng) for _ in range(4)])
    told = objective(
        student_rank=2, follow=0.5, records=str(tmp_path / "records"), windows=((3, 2),), window_weights=(1.0,)
    )
    config = settings(told, steps=8, checkpoint_every=3)
    whole = train(config, tmp_path / "whole")
    train(dataclasses.replace(config, steps=3), tmp_path / "cut")
    assert bits(train(config, tmp_path / "cut")) == bits(whole)
    with (tmp_path / "whole" / "metrics.csv").open() as file:
        columns = csv.DictReader(file).fieldnames
    assert {"student/loss", "critic/loss", "student/matching", "student/normaliser", "critic/motion"} <= set(columns)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"levels": (1.0, 0.25, 0.5)}, "must fall from 1"),
        ({"levels": (0.9, 0.5)}, "must fall from 1"),
        ({"levels": (1.0, 0.5, 0.5)}, "must fall from 1"),
        ({"follow": 0.1}, "cannot follow a student of all weights"),
        ({"follow": 0.1, "student_rank": 4}, "cannot follow one of rank 4"),
        ({"gan": ALWAYS}, "gan_taps is empty"),
        ({"gan_taps": (("single", 2),)}, "there is no single block 2, but 2 of them"),
        ({"matching_levels": (0.9, 0.1)}, "must rise"),
        ({"guidance_band": (0.9, 0.1)}, "ends before it begins"),
        ({"student_rank": 2, "student_from": "run"}, "a student of factors starts as the teacher"),
        ({"base": Ramp(start=1.0, end=0.5, steps=5), "critic_turns": 0}, "critic_turns is 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, fault):
    with pytest.raises(InputError, match=fault):
        objective(**changes)


def test_a_teacher_of_another_size_is_refused():
    wider = dataclasses.replace(SMALL, width=48, rope_axes=(8, 8, 8))
    with pytest.raises(InputError, match=r"run: .* the model wants"):
        at_start(objective(dit=wider), jax.random.key(0))
    deaf = dataclasses.replace(SMALL, double_depth=2)
    with pytest.raises(InputError, match="the model wants"):
        at_start(objective(dit=deaf), jax.random.key(0))
