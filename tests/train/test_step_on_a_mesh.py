"""A training step on eight devices is the step on one."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_avatar import draw_weights
from tiny_dit import TALKING

from mi_jax.mesh import make_mesh, on_mesh, shard_parameters
from mi_jax.models.dit import DiT
from mi_jax.train.curriculum import CurriculumObjective
from mi_jax.train.objective import TrainConfig
from mi_jax.train.samples import sampler
from mi_jax.train.state import init_state, make_step, split_model
from mi_jax.train.turns import OptimizerConfig

B, T, H, W = 8, 3, 4, 6
SHALLOW = dataclasses.replace(TALKING, double_depth=1, single_depth=2)
OBJECTIVE = CurriculumObjective(dit=SHALLOW, records="", adaptive_weight=10.0, motion_weight=2.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Showing(CurriculumObjective):
    """Keeps what it is to show."""

    seen: list

    def show(self, sampled):
        self.seen.append(sampled)


def batch(moving: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    mask = lambda *shape: (rng.random(shape) < 0.5).astype(np.float32)  # noqa: E731
    audio, frames = TALKING.audio, (T,) if moving else ()
    return {
        "latents": normal(B, T, H, W, TALKING.latent_channels),
        "portrait": normal(B, H, W, TALKING.latent_channels),
        "is_start": mask(B),
        "face_mask": mask(B, *frames, H, W),
        "audio_mask": mask(B, 2, *frames, H, W),
        "audio_steps": normal(B, 2, 8 * T + 8, audio.layers, audio.input_dim),
        "text_tokens": normal(B, 5, TALKING.text_dim),
        "text_mask": np.arange(5)[None] < rng.integers(1, 6, B)[:, None],
        "text_pooled": normal(B, TALKING.pooled_dim),
        "image_tokens": normal(B, 2, TALKING.text_dim),
    }


def steps(config: TrainConfig, params, graph, given, place):
    state = jax.jit(lambda params, key: init_state(config, params, key))(params, jax.random.key(1))
    step, losses = make_step(config, graph), []
    for _ in range(3):
        state, metrics = step(state, {}, jax.tree.map(place, given))
        losses.append([float(metrics[name]) for name in ("loss", "base", "face", "motion", "grad_norm")])
    return state, np.asarray(losses)


@pytest.mark.long
def test_losses_gradients_and_parameters_are_the_same():
    """With Muon for the matrices and Adam for the rest."""
    config = TrainConfig(
        name="mesh",
        objective=OBJECTIVE,
        steps=3,
        optimizer=OptimizerConfig(kind="muon", learning_rate=1e-3, ema_decay=0.9),
    )
    graph, params, _ = split_model(draw_weights(DiT, OBJECTIVE.dit, 0), OBJECTIVE)
    state, losses = steps(config, params, graph, batch(), lambda x: jax.device_put(x))
    mesh = make_mesh(data=4, seq=2)
    with jax.set_mesh(mesh):
        spread = shard_parameters(params, mesh)
        other, got = steps(config, spread, graph, batch(), lambda x: jax.device_put(x, P("data")))
        for leaf, first in zip(jax.tree.leaves(other.params), jax.tree.leaves(spread)):
            assert leaf.sharding.is_equivalent_to(first.sharding, leaf.ndim)  # nothing has moved
    np.testing.assert_allclose(got, losses, rtol=1e-4)
    assert losses[-1, 0] != losses[0, 0]
    for one, two in zip(jax.tree.leaves((state.params, state.ema)), jax.tree.leaves((other.params, other.ema))):
        # Adam divides by the gradient's own size: where that is nothing but rounding, a step may differ by its length.
        assert np.mean(np.abs(np.asarray(two) - one) < 1e-5 + 1e-3 * np.abs(one)) > 0.98


@pytest.mark.parametrize("moving", [False, True])
def test_products_of_bf16_have_gradients_on_a_mesh(moving):
    """Every device rounds for itself what all have alike. Traced alone: the sums are those above."""
    silent = dataclasses.replace(OBJECTIVE, dit=dataclasses.replace(SHALLOW, audio=None))
    for learner in (OBJECTIVE, silent):
        config = TrainConfig(
            name="low",
            objective=learner,
            steps=1,
            optimizer=OptimizerConfig(learning_rate=1e-3),
            matmul_precision="bfloat16",
        )
        graph, params, _ = split_model(draw_weights(DiT, learner.dit, 0), learner)
        mesh = make_mesh(data=4, seq=2)
        with jax.set_mesh(mesh):
            state = jax.eval_shape(partial(init_state, config), shard_parameters(params, mesh), jax.random.key(1))
            given = jax.tree.map(lambda x: jax.device_put(x, P("data")), batch(moving))
            text = make_step(config, graph).lower(state, {}, given).as_text()
        assert "bf16" in text


def test_samples_are_drawn_where_the_averages_lie():
    """On eight devices as on one: twenty Euler steps of every window of a batch."""
    silent = dataclasses.replace(OBJECTIVE, dit=dataclasses.replace(SHALLOW, audio=None))
    config = TrainConfig(name="show", objective=silent, steps=1, optimizer=OptimizerConfig(learning_rate=1e-3))
    graph, params, frozen = split_model(draw_weights(DiT, silent.dit, 0), silent)

    def sampled(mesh, place):
        given, seen = {name: place(x) for name, x in batch().items()}, []
        showing = dataclasses.replace(config, objective=Showing(**vars(silent), seen=seen))
        with on_mesh(mesh):
            sampler(showing, graph, given)(shard_parameters(params, mesh), frozen, 3)()
        return seen[0]

    one = make_mesh(devices=jax.devices()[:1])
    alone = sampled(one, jax.device_put)
    mesh = make_mesh(data=4, seq=2)
    spread = sampled(mesh, lambda x: jax.device_put(x, jax.NamedSharding(mesh, P("data"))))
    np.testing.assert_array_equal(spread["truth"], batch()["latents"])
    np.testing.assert_allclose(spread["generated"], alone["generated"], rtol=1e-3, atol=1e-4)
    assert spread["generated"].shape == (B, T, H, W, 16)
