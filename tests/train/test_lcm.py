"""Consistency distillation, where the consistent student is known in closed form: data N(m, q^2)."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_avatar import draw_weights
from tiny_records import TINY, record

from mi_jax.diffusion import sigma_schedule
from mi_jax.models.dit import DiT
from mi_jax.train.checkpoints import at_start
from mi_jax.train.distillation import Distillation
from mi_jax.train.lcm import LCMObjective
from mi_jax.train.objective import TrainConfig
from mi_jax.train.state import init_state, make_step, split_model
from mi_jax.train.turns import OptimizerConfig
from mi_jax.train.windows import cut_window

SILENT = dataclasses.replace(TINY, audio=None, double_depth=1, single_depth=2)
MEAN, SPREAD = 0.4, 0.7


def objective(**changes) -> LCMObjective:
    return LCMObjective(**{"dit": SILENT, "records": "", "teacher": "run", "teacher_dtype": "float32"} | changes)


def batch(b: int = 8, t: int = 3) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    cut = [cut_window(record(rng), rng, length=t, mid_clip=0.5, speakers=0) for _ in range(b)]
    return {name: jnp.asarray(np.stack([window[name] for window in cut])) for name in cut[0]}


def spread_of(sigma):
    return jnp.sqrt((1 - sigma) ** 2 * SPREAD**2 + sigma**2)


def teacher(x, sigma, conditions):
    """The exact velocity of the data."""
    s = sigma.reshape(-1, 1, 1, 1, 1)
    away = x - (1 - s) * MEAN
    variance = spread_of(s) ** 2
    return s * away / variance - (MEAN + (1 - s) * SPREAD**2 * away / variance)


def consistent(scale, x, sigma, conditions):
    """The velocity to where the exact flow ends: `m + q (x - (1 - s) m) / spread(s)`; `scale` 1 is right."""
    s = sigma.reshape(-1, 1, 1, 1, 1)
    end = MEAN + scale * SPREAD * (x - (1 - s) * MEAN) / spread_of(s)
    return (x - end) / jnp.maximum(s, 1e-6)


def known(student) -> Distillation:
    """A distillation of functions."""
    parts = {"teacher": jax.tree_util.Partial(teacher), "student": jax.tree_util.Partial(student)}
    members = {"__init__": lambda self: None, "denoiser": lambda self, name: parts[name]}
    return type("Known", (Distillation,), members)()


def loss(student, **changes) -> float:
    given = jax.tree.map(lambda x: jnp.tile(x, (25, *[1] * (x.ndim - 1))), batch())
    clean = MEAN + SPREAD * jax.random.normal(jax.random.key(3), given["latents"].shape)
    told = given | {"latents": clean}
    return float(objective(**changes).loss(known(student), told, jax.random.key(0))[0].mean())


def test_the_loss_is_least_where_clean_latents_agree_along_the_flow():
    """And there it is the error of the teacher's Euler step alone, which falls with its square. Others that agree among
    themselves fail at the lowest level, whose target is the data."""
    coarse, fine = (loss(partial(consistent, 1.0), grid=grid) for grid in (10, 40))
    assert fine < coarse / 8
    for other in (0.5, 1.5):
        assert loss(partial(consistent, other), grid=40) > 4 * fine
    assert loss(teacher, grid=40) > 4 * fine  # a velocity of the flow is no jump to its end


def test_neighbours_are_the_teachers_levels_and_end_at_the_data():
    told = objective(grid=50, shift=3.0)
    sigma, lower = told.neighbours(jnp.arange(50))
    np.testing.assert_array_equal(jnp.append(sigma, 0.0), sigma_schedule(50, 3.0))
    np.testing.assert_array_equal(lower[:-1], sigma[1:])
    assert float(lower[-1]) == 0


def test_the_face_is_raised():
    plain, raised = (loss(partial(consistent, 1.5), adaptive_weight=weight) for weight in (0.0, 2.0))
    assert raised == pytest.approx(3 * plain, rel=0.15)  # the error is the same everywhere


def test_only_the_student_is_trained(monkeypatch):
    model = draw_weights(DiT, SILENT, 5)
    monkeypatch.setattr("mi_jax.train.checkpoints._averages_of", lambda run: nnx.state(model))
    told = objective(student_rank=2, guidance_audio=1.0)
    config = TrainConfig(name="lcm", objective=told, steps=2, optimizer=OptimizerConfig(learning_rate=1e-3))
    graph, params, frozen = split_model(at_start(told, jax.random.key(0)), told)
    assert set(params) == {"student"}
    state = init_state(config, params, jax.random.key(1))
    before = np.asarray(jax.tree.leaves(state.params)[1])
    state, metrics = make_step(config, graph)(state, frozen, batch(2))
    assert float(metrics["consistency"]) > 0
    assert float(metrics["grad_norm"]) > 0
    assert any(np.any(np.asarray(leaf) != before) for leaf in jax.tree.leaves(state.params)[1:2])
