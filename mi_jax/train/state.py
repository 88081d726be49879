"""The state of a training run and the one optimiser step that carries it forward."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from mi_jax.errors import InputError
from mi_jax.mesh import batch_axis, parameter_spec, per_device, spec_of
from mi_jax.train.objective import Objective, TrainConfig, learning_rate

MUON_RMS = 0.2
"""Scale of Muon's updates, about that of Adam's, so that one learning rate serves both (Liu et al., 2502.16982)."""

NO_STEP = np.uint32(0xFFFF_FFFF)
"""A step that no run reaches: what is folded into the run's key there is folded into it nowhere else."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything a run needs to go on, as one pytree. Fields are untyped: JAX also fills them with tracers and specs.

    step: int32, optimiser steps taken or skipped. key: uint32 key data; step k draws from fold_in(key, k).
    params, ema: Any of the trained parameters, f32. opt_state: Adam's moments. skipped: int32, steps skipped
    because the loss or its gradient was not finite.
    """

    step: Any
    key: Any
    params: Any
    opt_state: Any
    ema: Any
    skipped: Any


def sharded_init(make: Callable[[jax.Array], nnx.Module], key: jax.Array) -> nnx.Module:
    """`make(key)`, drawn where the trainer keeps it: on several devices none ever holds the whole of a large leaf."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return make(key)
    graph, abstract = nnx.split(nnx.eval_shape(make, key))
    specs = [parameter_spec(leaf.shape, mesh) for leaf in jax.tree.leaves(abstract)]

    def draw(key):
        leaves, tree = jax.tree.flatten(nnx.state(make(key)))
        return jax.tree.unflatten(tree, [jax.reshard(leaf, spec) for leaf, spec in zip(leaves, specs, strict=True)])

    return nnx.merge(graph, jax.jit(draw)(key))


def split_model(model: nnx.Module, objective: Objective) -> tuple[Any, Any, Any]:
    """(graph definition, trained parameters, everything else): by the objective's `trainable`, if it has one."""
    trainable = getattr(objective, "trainable", lambda path: True)
    return nnx.split(model, lambda path, leaf: isinstance(leaf, nnx.Param) and trainable(path), ...)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW or Muon on clipped gradients, up to the factor -learning_rate, which the step applies itself (it logs it,
    too)."""
    direction = optax.scale_by_adam(b1=config.b1, b2=config.b2)
    if config.optimizer == "muon":
        muon = optax.chain(
            optax.contrib.scale_by_muon(weight_dimension_numbers=_matrices),
            optax.stateless(lambda updates, _: jax.tree.map(_at_muon_rms, updates)),
        )
        direction = optax.partition({"muon": muon, "adam": direction}, _muon_or_adam)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm), direction, optax.add_decayed_weights(config.weight_decay)
    )


def _muon_or_adam(params: Any) -> Any:
    """Muon for the kernels of linear maps and convolutions, Adam for biases, norms, embeddings and queries."""

    def label(path, _leaf):
        return "muon" if any(getattr(entry, "key", None) == "kernel" for entry in path) else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def _at_muon_rms(update: jax.Array) -> jax.Array:
    """An orthogonal [n m] matrix has entries of RMS 1 / sqrt(max(n, m))."""
    inputs = math.prod(update.shape[:4]) if update.ndim == 5 else update.shape[-2]
    return update * (MUON_RMS * math.sqrt(max(inputs, update.shape[-1])))


def _matrices(params: Any) -> Any:
    """How each kernel is a matrix: all taps of a 3D convolution are inputs, leading axes of layers are a batch."""

    def matrix(kernel):
        return optax.contrib.MuonDimensionNumbers((0, 1, 2, 3) if kernel.ndim == 5 else -2, -1)

    return jax.tree.map(matrix, params)


def init_state(config: TrainConfig, params: Any, key: jax.Array) -> TrainState:
    """The state before step 0. `key` is typed. Params and EMA are separate buffers: the step donates both."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(key),
        params=params,
        opt_state=make_optimizer(config).init(params),
        ema=jax.tree.map(jnp.copy, params),
        skipped=jnp.zeros((), jnp.int32),
    )


def compute_copy(tree: Any, dtype: str) -> Any:
    """The parameters as the loss sees them: in `dtype`, spread as the masters are.

    Models gather them where they are used (`mesh.gather_parameters`), one layer at a time if they are large;
    cast before that, so that half the bytes travel. Autodiff turns the gather into the scatter of the gradient.
    """
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _update(optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    """optax's update. On a mesh everything stays where it is, and what Muon's products move is left to the compiler."""
    if jax.sharding.get_abstract_mesh().size <= 1:
        return optimizer.update(grads, opt_state, params)
    specs = jax.tree.map(spec_of, (params, opt_state))
    return jax.sharding.auto_axes(lambda *told: optimizer.update(*told), out_sharding=specs)(grads, opt_state, params)


def _accumulated(grad: Callable, parts: int, params: Any, frozen: Any, batch: dict[str, jax.Array], key: jax.Array):
    """What `grad` gives, as the mean over the parts of a batch, one at a time in memory. Each part has its own key."""
    if parts == 1:
        return grad(params, frozen, batch, key)
    axis = batch_axis(jax.tree.leaves(batch)[0])

    def split(batch):
        rows = len(jax.tree.leaves(batch)[0])
        if rows % parts:
            raise InputError(f"accumulate is {parts}, which does not divide the {rows} examples of one device")
        return jax.tree.map(lambda x: x.reshape(parts, rows // parts, *x.shape[1:]), batch)

    def add(total, told):
        number, part = told
        values, grads = grad(params, frozen, part, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, total, grads), values

    told = jnp.arange(parts), per_device(split, P(None, axis))(batch)
    grads, values = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), told)
    return jax.tree.map(jnp.mean, values), jax.tree.map(lambda total: total / parts, grads)


def make_step(config: TrainConfig, graph: Any) -> Callable:
    """`step(state, frozen, batch) -> (state, metrics)`, jitted; `state` is donated. Compiled once per batch shape."""
    return jax.jit(_step_of(config, graph), donate_argnums=0)


def make_steps(config: TrainConfig, graph: Any) -> Callable:
    """`steps(state, frozen, pool, kind, count) -> (state, metrics)`, jitted: `count` steps of `make_step` in one call,
    each on a batch that the objective draws out of `pool`; metrics [count]. `state` is donated. Compiled once per kind
    and count.

    What step k draws depends on the run's key and k alone.
    """
    step = _step_of(config, graph)

    @partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
    def steps(state: TrainState, frozen: Any, pool: dict[str, jax.Array], kind: int, count: int):
        def one(state, _):
            return step(state, frozen, config.objective.draw(pool, draw_key(state), kind))

        return jax.lax.scan(one, state, length=count)

    return steps


def draw_key(state: TrainState) -> jax.Array:
    """The key that the next step's batch is drawn with; none of the loss's."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(state.key), NO_STEP), state.step)


def _step_of(config: TrainConfig, graph: Any) -> Callable:
    """The optimiser step itself, for a call of one or a scan over several."""
    optimizer, rate = make_optimizer(config), learning_rate(config)

    def mean_loss(params, frozen, batch, key):
        params, frozen = (compute_copy(tree, config.compute_dtype) for tree in (params, frozen))
        losses, extras = config.objective.loss(nnx.merge(graph, params, frozen), batch, key)
        return losses.astype(jnp.float32).mean(), extras

    def step(state: TrainState, frozen: Any, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        with jax.default_matmul_precision(config.matmul_precision):
            (loss, extras), grads = _accumulated(
                jax.value_and_grad(mean_loss, has_aux=True), config.accumulate, state.params, frozen, batch, key
            )
        norm, lr = optax.tree.norm(grads), rate(state.step)

        with jax.numpy_dtype_promotion("standard"):  # Adam's bias correction raises a float to an int32 power
            updates, opt_state = _update(optimizer, grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)
        count = state.step.astype(jnp.float32)
        decay = jnp.minimum(config.ema_decay, (1.0 + count) / (10.0 + count))
        ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, state.ema, params)

        # A sum of squares overflows before any entry of the gradient does, so the norm speaks for all of them.
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        old = (state.params, state.opt_state, state.ema)
        params, opt_state, ema = jax.tree.map(partial(jnp.where, finite), (params, opt_state, ema), old)
        skipped = state.skipped + (~finite).astype(jnp.int32)
        new = dataclasses.replace(
            state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema, skipped=skipped
        )
        return new, {"loss": loss, "grad_norm": norm, "learning_rate": lr, "skipped": skipped, **extras}

    return step
