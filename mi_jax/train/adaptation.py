"""The curriculum on someone's own records by low-rank factors: the denoiser that it starts from stays as it is."""

import dataclasses
from typing import Literal

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from mi_jax.errors import InputError
from mi_jax.models import lora
from mi_jax.models.dit import DiT
from mi_jax.train.checkpoints import start_from
from mi_jax.train.curriculum import CurriculumObjective
from mi_jax.train.distillation import Rank, adapter_of, cast
from mi_jax.train.state import sharded_init
from mi_jax.train.turns import Turn


class Adapted(nnx.Module):
    """A denoiser that is not trained, and the factors that are."""

    def __init__(self, base: DiT, adapter: lora.Adapter):
        self.base, self.adapter = base, adapter

    def denoiser(self) -> DiT:
        return lora.adapt(self.base, self.adapter.factors())


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptationObjective(CurriculumObjective):
    """Flow matching as in the curriculum, of factors of the blocks' kernels. `init_from` is the denoiser that they
    adapt, and must be given."""

    rank: Rank = 32
    base_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """In which the denoiser lies in memory."""

    def __post_init__(self):
        super().__post_init__()
        if self.init_from is None:
            raise InputError("init_from is not given: the run or model whose denoiser is adapted")

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(trains=lambda path: path[0] == "adapter"),)

    def init(self, key: Key[Array, ""]) -> Adapted:
        def make(key):
            keys = jax.random.split(key)
            base = DiT(self.dit, rngs=nnx.Rngs(keys[0]))
            return Adapted(cast(base, self.base_dtype), adapter_of(base, self.rank, keys[1]))

        return sharded_init(make, key)

    def warm_start(self, model: Adapted) -> Adapted:
        model.base = cast(start_from(model.base, self.init_from, "dit", whole=True), self.base_dtype)
        return model

    def loss(
        self,
        model: Adapted,
        batch: dict[str, Array | np.ndarray],
        key: Key[Array, ""],
        turn: str = "model",
        step: Array | int = 0,
    ) -> tuple[Float[Array, "b"], dict[str, Array]]:
        """The curriculum's, of the adapted denoiser."""
        return super().loss(model.denoiser(), batch, key, turn, step)

    def sample(self, model: Adapted, batch: dict[str, Array], key: Key[Array, ""]) -> dict[str, Array]:
        """The curriculum's, of the adapted denoiser."""
        return super().sample(model.denoiser(), batch, key)
