"""The state of a training run and the one optimiser step that carries it forward."""

import dataclasses
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
from mi_jax.train.objective import Objective, TrainConfig
from mi_jax.train.turns import OptimizerConfig, Turn, turns_of

NO_STEP = np.uint32(0xFFFF_FFFF)
"""A step that no run reaches: what is folded into the run's key there is folded into it nowhere else."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything a run needs to go on, as one pytree. Fields are untyped: JAX also fills them with tracers and specs.

    step: int32, optimiser steps taken or skipped, of all turns together. key: uint32 key data; step k draws from
    fold_in(key, k).
    params, opt_state, ema: by the name of the turn: the parameters that it trains (f32), its optimiser's moments, and
    the average of the parameters where it keeps one.
    skipped: int32, steps skipped because the loss or its gradient was not finite.
    """

    step: Any
    key: Any
    params: dict[str, Any]
    opt_state: dict[str, Any]
    ema: dict[str, Any]
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


def split_model(model: nnx.Module, objective: Objective) -> tuple[Any, dict[str, Any], Any]:
    """(graph definition, the parameters of each turn by its name, everything else).

    Raises:
      ValueError: two turns train the same parameter.
    """
    turns = turns_of(objective)
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        trained_by = [turn.name for turn in turns if turn.trains(path)]
        if len(trained_by) > 1:
            raise ValueError(f"{'.'.join(map(str, path))} is trained by {' and '.join(trained_by)}")

    def of(turn):
        return lambda path, leaf: isinstance(leaf, nnx.Param) and turn.trains(path)

    graph, *params, frozen = nnx.split(model, *map(of, turns), ...)
    return graph, dict(zip((turn.name for turn in turns), params, strict=True)), frozen


def merge_model(graph: Any, params: dict[str, Any], frozen: Any) -> nnx.Module:
    """The module that `split_model` split."""
    return nnx.merge(graph, *params.values(), frozen)


def averaged(state: TrainState) -> dict[str, Any]:
    """The parameters of each turn as they are sampled and handed on: their averages, where there are some."""
    return state.params | state.ema


def optimizer_of(config: TrainConfig, turn: Turn) -> OptimizerConfig:
    return config.optimizer if turn.optimizer is None else turn.optimizer


def init_state(config: TrainConfig, params: dict[str, Any], key: jax.Array) -> TrainState:
    """The state before step 0. `key` is typed. Params and EMA are separate buffers: the step donates both."""
    turns = {turn.name: optimizer_of(config, turn) for turn in turns_of(config.objective)}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(key),
        params=params,
        opt_state={name: optimizer.transformation().init(params[name]) for name, optimizer in turns.items()},
        ema={
            name: jax.tree.map(jnp.copy, params[name])
            for name, optimizer in turns.items()
            if optimizer.ema_decay is not None
        },
        skipped=jnp.zeros((), jnp.int32),
    )


def compute_copy(tree: Any, dtype: str) -> Any:
    """The parameters as the loss sees them: in `dtype` where theirs is wider, spread as the masters are.

    Models gather them where they are used (`mesh.gather_parameters`), one layer at a time if they are large;
    cast before that, so that half the bytes travel. Autodiff turns the gather into the scatter of the gradient.
    """

    def cast(x):
        wider = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > jnp.dtype(dtype).itemsize
        return x.astype(dtype) if wider else x

    return jax.tree.map(cast, tree)


def _update(optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    """optax's update. On a mesh everything stays where it is, and what Muon's products move is left to the compiler."""
    if jax.sharding.get_abstract_mesh().size <= 1:
        return optimizer.update(grads, opt_state, params)
    specs = jax.tree.map(spec_of, (params, opt_state))
    return jax.sharding.auto_axes(lambda *trees: optimizer.update(*trees), out_sharding=specs)(grads, opt_state, params)


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

    def add(total, numbered):
        number, part = numbered
        values, grads = grad(params, frozen, part, jax.random.fold_in(key, number))
        return jax.tree.map(jnp.add, total, grads), values

    numbered = jnp.arange(parts), per_device(split, P(None, axis))(batch)
    grads, values = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), numbered)
    return jax.tree.map(jnp.mean, values), jax.tree.map(lambda total: total / parts, grads)


def make_step(config: TrainConfig, graph: Any, turn: Turn | None = None) -> Callable:
    """`step(state, frozen, batch) -> (state, metrics)`, jitted: one step of `turn` (by default the objective's only
    one); `state` is donated. Compiled once per batch shape."""
    return jax.jit(_step_of(config, graph, turn), donate_argnums=0)


def make_steps(config: TrainConfig, graph: Any, turn: Turn | None = None) -> Callable:
    """`steps(state, frozen, pool, kind, count) -> (state, metrics)`, jitted: `count` steps of `make_step` in one call,
    each on a batch that the objective draws out of `pool`; metrics [count]. `state` is donated. Compiled once per kind
    and count.

    What step k draws depends on the run's key and k alone.
    """
    step = _step_of(config, graph, turn)

    @partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
    def steps(state: TrainState, frozen: Any, pool: dict[str, jax.Array], kind: int, count: int):
        def one(state, _):
            return step(state, frozen, config.objective.draw(pool, draw_key(state), kind))

        return jax.lax.scan(one, state, length=count)

    return steps


def draw_key(state: TrainState) -> jax.Array:
    """The key that the next step's batch is drawn with; none of the loss's."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(state.key), NO_STEP), state.step)


def _step_of(config: TrainConfig, graph: Any, turn: Turn | None) -> Callable:
    """The optimiser step itself, for a call of one or a scan over several."""
    if turn is None:
        (turn,) = turns_of(config.objective)
    settings, name = optimizer_of(config, turn), turn.name
    optimizer = settings.transformation()

    def mean_loss(number, params, constant, batch, key):
        params, constant = (compute_copy(tree, config.compute_dtype) for tree in (params, constant))
        model = nnx.merge(graph, params, *constant)
        losses, extras = config.objective.loss(model, batch, key, name, number)
        return losses.astype(jnp.float32).mean(), extras

    def step(state: TrainState, frozen: Any, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        old_params, others = state.params[name], [tree for of, tree in state.params.items() if of != name]
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        grad = partial(jax.value_and_grad(mean_loss, argnums=1, has_aux=True), state.step)
        with jax.default_matmul_precision(config.matmul_precision):
            (loss, extras), grads = _accumulated(grad, config.accumulate, old_params, (*others, frozen), batch, key)
        norm, lr = optax.tree.norm(grads), settings.rate(state.step, config.steps)

        with jax.numpy_dtype_promotion("standard"):  # Adam's bias correction raises a float to an int32 power
            updates, opt_state = _update(optimizer, grads, state.opt_state[name], old_params)
        params, ema = jax.tree.map(lambda p, u: p - lr * u, old_params, updates), {}
        if hasattr(config.objective, "after"):
            beside = {of: tree for of, tree in state.params.items() if of != name}
            params = config.objective.after(name, params, beside, state.step)
        if name in state.ema:
            count = state.step.astype(jnp.float32)
            decay = jnp.minimum(settings.ema_decay, (1.0 + count) / (10.0 + count))
            ema = {name: jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, state.ema[name], params)}

        # A sum of squares overflows before any entry of the gradient does, so the norm speaks for all of them.
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = {"params": {name: params}, "opt_state": {name: opt_state}, "ema": ema}
        old = {field: {of: getattr(state, field)[of] for of in part} for field, part in new.items()}
        new = jax.tree.map(partial(jnp.where, finite), new, old)
        skipped = state.skipped + (~finite).astype(jnp.int32)
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            skipped=skipped,
            **{field: getattr(state, field) | part for field, part in new.items()},
        )
        return state, {"loss": loss, "grad_norm": norm, "learning_rate": lr, "skipped": skipped, **extras}

    return step
