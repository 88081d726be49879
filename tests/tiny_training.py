"""A training that takes milliseconds a step, for the laws of the trainer."""

import csv
import dataclasses
import hashlib
import os
import signal

import grain
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mi_jax.mesh import gather_parameters
from mi_jax.train.checkpoints import named_leaves
from mi_jax.train.objective import TrainConfig
from mi_jax.train.turns import OptimizerConfig, Turn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regression:
    """A two-layer network learns a sine from random points: random data, shuffling, prefetch and noise in the loss."""

    width: int = 16
    batch: int = 8
    lengths: tuple[int, ...] = (4,)  # points per example, one length per batch in turn
    noise: float = 0.01
    poisoned: tuple[int, ...] = ()  # batches that hold a NaN
    batches: int | None = None
    frozen: str = ""
    die: bool = False  # at the first sample, as by SIGKILL

    def init(self, key):
        rngs = nnx.Rngs(params=key)
        layers = {"inner": nnx.Linear(3, self.width, rngs=rngs), "outer": nnx.Linear(self.width, 1, rngs=rngs)}
        return nnx.Dict(**layers)

    @property
    def turns(self):
        return (Turn(trains=lambda path: path[0] != self.frozen),)

    def dataset(self, seed, share=0, shares=1):
        def draw(i, rng):
            x = rng.normal(size=(self.lengths[i % len(self.lengths)], self.batch, 3)).astype(np.float32)
            x = np.array_split(x, shares, axis=1)[share]
            if i in self.poisoned:
                x[0, 0, 0] = np.nan
            x = np.moveaxis(x, 1, 0)
            return {"x": x, "y": np.sin(x.sum(-1, keepdims=True)), "name": np.array([str(i)] * x.shape[0])}

        # Shuffled, unless a test speaks of certain batches.
        indices = grain.MapDataset.range(self.batches or 10_000).seed(seed)
        if not (self.poisoned or self.batches or self.lengths != (4,)):
            indices = indices.shuffle()
        return (indices if self.batches else indices.repeat()).random_map(draw)

    def loss(self, model, batch, key, turn, step):
        model = gather_parameters(model)
        x = batch["x"].astype(model["inner"].kernel.dtype)
        x = x + self.noise * jax.random.normal(key, x.shape, x.dtype)
        error = jnp.square(model["outer"](jnp.tanh(model["inner"](x))) - batch["y"].astype(x.dtype))
        return error.mean((1, 2)), {"worst": error.astype(jnp.float32).max()}

    def shows(self):
        return True

    def sample(self, model, batch, key):
        model = gather_parameters(model)
        return model["outer"](jnp.tanh(model["inner"](batch["x"].astype(model["inner"].kernel.dtype))))

    def show(self, sampled):
        if self.die:
            os.kill(os.getpid(), signal.SIGKILL)
        shades = np.clip(128 + 100 * sampled[:6, :1].astype(np.float32), 0, 255).astype(np.uint8)
        return {"picture": np.repeat(shades, 3, axis=2)}


OPTIMIZER = {field.name for field in dataclasses.fields(OptimizerConfig)}


def config(objective=None, **changes):
    """An experiment whose fields, or whose optimiser's, are changed."""
    optimizer = {"learning_rate": 1e-2} | {name: changes.pop(name) for name in OPTIMIZER & changes.keys()}
    base = {"steps": 12, "checkpoint_every": 5, "log_every": 4, "sample_every": 0}
    objective = objective or Regression()
    return TrainConfig(name="test", objective=objective, optimizer=OptimizerConfig(**optimizer), **base | changes)


def digests(state):
    return {name: hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for name, leaf in named_leaves(state).items()}


def rows(out_dir):
    with (out_dir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))
