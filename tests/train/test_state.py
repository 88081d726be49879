"""What Muon does to each kind of parameter, and where a run's first parameters lie."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_avatar import draw_weights
from tiny_dit import TALKING

from mi_jax.mesh import make_mesh, parameter_spec
from mi_jax.models.dit import DiT
from mi_jax.train.checkpoints import at_start
from mi_jax.train.curriculum import CurriculumObjective
from mi_jax.train.objective import TrainConfig
from mi_jax.train.state import init_state, make_step, split_model
from mi_jax.train.turns import MUON_RMS, OptimizerConfig
from mi_jax.weights.native import save_model

KERNELS = {"linear": (12, 20), "layers": (3, 16, 8), "conv": (3, 3, 3, 4, 6)}


@pytest.fixture(scope="module")
def stepped():
    """Gradients and first updates of kernels of every kind and a bias, without clipping or decay."""
    optimizer = OptimizerConfig(kind="muon", learning_rate=1.0, clip_norm=1e9, weight_decay=0.0).transformation()
    keys = jax.random.split(jax.random.key(0), len(KERNELS) + 1)
    grads = {name: {"kernel": jax.random.normal(key, shape)} for key, (name, shape) in zip(keys, KERNELS.items())}
    grads["linear"]["bias"] = jax.random.normal(keys[-1], (20,))
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    return grads, updates


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_move_along_an_orthogonal_matrix_of_adams_scale(stepped, name):
    grads, updates = (np.asarray(tree[name]["kernel"], np.float64) for tree in stepped)
    matrices = -1 if name == "layers" else 1
    shape = (grads.shape[0], *grads.shape[1:]) if matrices == -1 else (1, -1, grads.shape[-1])
    for grad, update in zip(grads.reshape(shape), updates.reshape(shape)):
        u, _, v = np.linalg.svd(grad, full_matrices=False)
        scale = MUON_RMS * math.sqrt(max(grad.shape))
        singular = np.diag(u.T @ update @ v.T) / scale
        # Newton-Schulz brings singular values near 1, not to it, and keeps the singular vectors.
        assert 0.6 < singular.min() <= singular.max() < 1.3
        np.testing.assert_allclose(u @ np.diag(singular) @ v * scale, update, atol=1e-3 * scale)


def test_what_is_no_kernel_moves_as_adam(stepped):
    grads, updates = stepped
    adam = optax.scale_by_adam()
    bias = jnp.asarray(grads["linear"]["bias"])
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = adam.update(bias, adam.init(bias))
    np.testing.assert_allclose(updates["linear"]["bias"], expected, rtol=1e-6)


@pytest.mark.long
def test_a_spread_model_is_drawn_and_read_where_it_stays(tmp_path):
    """What the trainer starts from on eight devices is what it starts from on one."""
    objective = CurriculumObjective(dit=TALKING, records="")
    alone = nnx.state(objective.init(jax.random.key(3)))
    save_model(tmp_path / "start", {"dit": draw_weights(DiT, TALKING, 4)}, {}, dtype=np.float32)
    started = dataclasses.replace(objective, init_from=str(tmp_path / "start"))
    mesh = make_mesh(data=4, seq=2)
    with jax.set_mesh(mesh):
        drawn = nnx.state(objective.init(jax.random.key(3)))
        read = nnx.state(at_start(started, jax.random.key(3)))
    for one, two, three in zip(*map(jax.tree.leaves, (alone, drawn, read))):
        np.testing.assert_allclose(one, two, atol=1e-6)
        wanted = jax.NamedSharding(mesh, parameter_spec(one.shape, mesh))
        assert two.sharding.is_equivalent_to(wanted, one.ndim)
        assert three.sharding.is_equivalent_to(wanted, one.ndim)
    again = nnx.state(at_start(started, jax.random.key(3)))
    jax.tree.map(np.testing.assert_array_equal, again, read)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    """A loss that is a random number, or (`root`) the square root of a parameter that is 0."""

    root: bool = False

    def init(self, key):
        return nnx.Dict(x=nnx.Param(jnp.zeros(())))

    def dataset(self, seed, share=0, shares=1):
        raise NotImplementedError

    def loss(self, model, batch, key, turn, step):
        drawn, x = jax.random.uniform(key), model["x"][...]
        return (jnp.sqrt(x) if self.root else drawn + 0 * x) + 0 * batch["x"], {"drawn": drawn}


def take_a_step(objective, **changes):
    optimizer = OptimizerConfig(learning_rate=1.0)
    config = TrainConfig(name="test", objective=objective, steps=1, optimizer=optimizer, **changes)
    graph, params, frozen = split_model(objective.init(jax.random.key(0)), objective)
    state = init_state(config, params, jax.random.key(1))
    return make_step(config, graph)(state, frozen, {"x": jnp.zeros(4)})


def test_every_accumulated_part_has_a_key_of_its_own():
    _, metrics = take_a_step(Drawing(), accumulate=4)
    key = jax.random.fold_in(jax.random.key(1), 0)
    drawn = [float(jax.random.uniform(jax.random.fold_in(key, part))) for part in range(4)]
    assert len(set(drawn)) == 4
    np.testing.assert_allclose(metrics["drawn"], np.mean(drawn), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], np.mean(drawn), rtol=1e-6)


def test_a_finite_loss_with_an_infinite_gradient_is_skipped():
    state, metrics = take_a_step(Drawing(root=True))
    assert float(metrics["loss"]) == 0.0
    assert np.isinf(metrics["grad_norm"])
    assert (int(state.step), int(state.skipped)) == (1, 1)
    assert float(state.params["model"]["x"][...]) == 0.0


def test_an_average_is_warmed_up():
    """After the first step it is 0.1 of the start and 0.9 of the parameters, whatever its decay is to be later."""
    state, _ = take_a_step(Drawing())  # no gradient: only the weight decay's direction, of a parameter that is 0
    assert float(state.ema["model"]["x"][...]) == 0.0

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Falling(Drawing):
        def loss(self, model, batch, key, turn, step):
            return model["x"][...] + 0 * batch["x"], {}

    state, _ = take_a_step(Falling())
    np.testing.assert_allclose(state.params["model"]["x"][...], -1.0, rtol=1e-5)
    np.testing.assert_allclose(state.ema["model"]["x"][...], -0.9, rtol=1e-5)
