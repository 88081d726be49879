"""The paper's two-stage curriculum (3.3): portrait and text first, then audio with the face-masked adaptive loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from mi_jax.bounds import Positive, Share, Weight
from mi_jax.diffusion import sample_sigma
from mi_jax.mesh import spec_of
from mi_jax.models.dit import DiT
from mi_jax.train.checkpoints import start_from
from mi_jax.train.denoiser import DenoiserObjective
from mi_jax.train.flow import adaptive_loss, base_loss, condition_dropout, motion_loss, squared_error
from mi_jax.train.state import sharded_init


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurriculumObjective(DenoiserObjective):
    """Flow matching on prepared records. Stage 1 has a `dit` without audio and `adaptive_weight` 0; stage 2
    adds both."""

    init_from: str | None = None
    """A finished run whose averaged parameters this one starts from, a shipped model or a model folder; leaves it lacks
    (audio) keep their initial values."""
    sigma_scale: Positive = 1.0
    """Spread of the noise levels, before the shift (`sample_sigma`)."""
    motion_weight: Weight = 0.0
    """Weight of `flow.motion_loss`, which the paper does not have."""
    drop_each: Share = 0.1
    drop_all: Share = 0.05

    def init(self, key: Key[Array, ""]) -> DiT:
        return sharded_init(lambda key: DiT(self.dit, rngs=nnx.Rngs(key)), key)

    def warm_start(self, model: DiT) -> DiT:
        if self.init_from is None:
            return model
        return start_from(model, self.init_from, "dit")

    def loss(
        self,
        model: DiT,
        batch: dict[str, Array | np.ndarray],
        key: Key[Array, ""],
        turn: str = "model",
        step: Array | int = 0,
    ) -> tuple[Float[Array, "b"], dict[str, Array]]:
        """`L_total = L_base + lambda L_adap` (Eq. 4) and any motion loss, per example; the means as scalars."""
        keys = jax.random.split(key, 3)
        clean = batch["latents"].astype(jnp.float32)
        conditions = self.conditions(model, batch)
        conditions = conditions.drop(**condition_dropout(keys[0], clean.shape[0], self.drop_each, self.drop_all))
        sigma = sample_sigma(keys[1], (clean.shape[0],), self.shift, self.sigma_scale)
        noise = jax.random.normal(keys[2], clean.shape, jnp.float32, out_sharding=spec_of(clean))
        error = squared_error(model, clean, noise, sigma, conditions)
        base, adaptive = base_loss(error), adaptive_loss(error, batch["face_mask"])
        total, parts = base + self.adaptive_weight * adaptive, {"base": base, "face": adaptive}
        if self.motion_weight:
            parts["motion"] = motion_loss(error, clean, batch["portrait"].astype(jnp.float32))
            total = total + self.motion_weight * parts["motion"]
        return total, {name: jnp.mean(part) for name, part in parts.items()}
