"""What is trained when, and how: optimisers, and the turns of objectives that train several parts in turn."""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax

from mi_jax.bounds import Share, Within, check_fields

MUON_RMS = 0.2
"""Scale of Muon's updates, about that of Adam's, so that one learning rate serves both (Liu et al., 2502.16982)."""

_Decay = Annotated[float, Within(0, below=1)]

Path = tuple[str | int, ...]
"""Where a parameter is in its module: names and indices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up, a flat rate and a linear decay to 0, gradient clipping and an EMA.

    learning_rate: of the flat part.
    kind: AdamW, or Muon for the matrices and Adam for the rest (Jordan et al. 2024; both with decoupled decay).
    warmup_steps: steps of linear warm-up; step k of the run is at (k + 1) / warmup_steps of the rate.
    decay_fraction: share of the run's steps, at the end, over which the rate falls linearly to 0; 0 keeps it constant.
    weight_decay: decoupled (AdamW), on every trained parameter, as PyTorch's default.
    clip_norm: the gradient's global norm is clipped to this.
    ema_decay: of an EMA of the parameters, warmed up as min(ema_decay, (1 + step) / (10 + step)); None: there is none.
    """

    learning_rate: Annotated[float, Within(0, 100)]
    kind: Literal["adamw", "muon"] = "adamw"
    warmup_steps: Annotated[int, Within(0, 10**9)] = 0
    decay_fraction: Share = 0.0
    weight_decay: Annotated[float, Within(0, 100)] = 0.01
    b1: _Decay = 0.9
    b2: _Decay = 0.999
    clip_norm: Annotated[float, Within(above=0, most=1e30)] = 1.0
    ema_decay: Share | None = 0.999

    def __post_init__(self):
        check_fields(self)

    def rate(self, step: jax.Array | int, steps: int) -> jax.Array:
        """The learning rate at step 0, 1, ... of a run of `steps`: at the last one it would reach 0, if it decays."""
        step, decay_steps = jnp.asarray(step, jnp.float32), self.decay_fraction * steps
        warmup = jnp.minimum(1.0, (step + 1.0) / max(self.warmup_steps, 1))
        left = jnp.clip((steps - step) / decay_steps, 0.0, 1.0) if decay_steps else 1.0
        return self.learning_rate * warmup * left

    def transformation(self) -> optax.GradientTransformation:
        """From gradients to updates, up to the factor `-rate(step)`."""
        direction = optax.scale_by_adam(b1=self.b1, b2=self.b2)
        if self.kind == "muon":
            muon = optax.chain(
                optax.contrib.scale_by_muon(weight_dimension_numbers=_matrices),
                optax.stateless(lambda updates, _: jax.tree.map(_at_muon_rms, updates)),
            )
            direction = optax.partition({"muon": muon, "adam": direction}, _muon_or_adam)
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm), direction, optax.add_decayed_weights(self.weight_decay)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """A part of the module that is trained by steps of its own.

    trains: whether the parameter at a path is of this part. What no turn trains is frozen.
    optimizer: None: the experiment's.
    """

    name: str = "model"
    trains: Callable[[Path], bool] = lambda path: True
    optimizer: OptimizerConfig | None = None


def turns_of(objective: Any) -> tuple[Turn, ...]:
    """The objective's turns; without any, all of the module is one, named "model"."""
    return getattr(objective, "turns", None) or (Turn(),)


def turn_at(objective: Any, step: int) -> Turn:
    """Whose step it is."""
    turns = {turn.name: turn for turn in turns_of(objective)}
    return turns[objective.turn(step)] if len(turns) > 1 else next(iter(turns.values()))


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
