"""Weights of losses that change while a run goes on."""

import dataclasses
from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Float

from mi_jax.bounds import Weight, Within, check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ramp:
    """`Ramp(start=1.0, end=0.1, steps=600)(step)`: linear from `start` at step 0 to `end` at step `steps`, then flat.

    Steps are the run's, of all turns together.
    """

    start: Weight
    end: Weight
    steps: Annotated[int, Within(0, 10**9)] = 0

    def __post_init__(self):
        check_fields(self)

    def __call__(self, step: Array | int) -> Float[Array, ""]:
        done = jnp.clip(jnp.asarray(step, jnp.float32) / max(self.steps, 1), 0.0, 1.0) if self.steps else 1.0
        return jnp.float32(self.start + (self.end - self.start) * done)

    @property
    def is_zero(self) -> bool:
        """Whether it weighs nothing at any step."""
        return not self.start and not self.end
