"""Consistency distillation (LCM), the paper's losing baseline: on the same model, data and budget as DMD2."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from mi_jax.bounds import Positive, Within
from mi_jax.diffusion import add_noise, clean_from_velocity, euler_step, sigma_schedule
from mi_jax.mesh import spec_of
from mi_jax.sample.guidance import Guidance
from mi_jax.train.distillation import Distillation, DistillationObjective
from mi_jax.train.dmd2 import face_weights
from mi_jax.train.flow import per_example


@dataclasses.dataclass(frozen=True, kw_only=True)
class LCMObjective(DistillationObjective):
    """The student's clean latents at one level are those at the next lower one, to which the guided teacher leads
    (Song et al., arXiv 2303.01469; Luo et al., 2310.04378).

    `f(x, s) = x - s u(x, s)` is x itself at s = 0. The target is the student's own, not differentiated.
    """

    grid: Annotated[int, Within(2, 10_000)] = 50
    """Steps of the teacher's sampler, between whose levels consistency is asked."""
    huber: Positive = 1e-3
    """c of the pseudo-Huber distance `sqrt(d^2 + c^2) - c`."""

    def evaluations(self, turn: str) -> tuple[float, float]:
        return 1.0 + Guidance(audio=self.guidance_audio, text=self.guidance_text).branches, 1.0

    def loss(
        self,
        model: Distillation,
        batch: dict[str, Array | np.ndarray],
        key: Key[Array, ""],
        turn: str = "student",
        step: Array | int = 0,
    ) -> tuple[Float[Array, "b"], dict[str, Array]]:
        """The distance of both clean latents, for each example, that over the face raised as in Eq. 4."""
        keys = jax.random.split(key, 3)
        clean = batch["latents"].astype(jnp.float32)
        noise = jax.random.normal(keys[0], clean.shape, jnp.float32, out_sharding=spec_of(clean))
        sigma, lower = self.neighbours(jax.random.randint(keys[1], clean.shape[:1], 0, self.grid))
        sigma, lower = per_example(sigma, clean), per_example(lower, clean)
        noisy = add_noise(clean, noise, sigma)
        student, teacher = model.denoiser("student"), jax.lax.stop_gradient(model.denoiser("teacher"))
        told = self.conditions(student, batch)

        velocity = self.guidance(sigma, keys[2])(teacher)(noisy, sigma, self.conditions(teacher, batch))
        nearer = euler_step(noisy, velocity, sigma, lower)
        still = jax.lax.stop_gradient((student, told))
        target = jax.lax.stop_gradient(clean_from_velocity(nearer, still[0](nearer, lower, still[1]), lower))
        predicted = clean_from_velocity(noisy, student(noisy, sigma, told), sigma)
        distance = jnp.sqrt(jnp.square(predicted - target) + self.huber**2) - self.huber
        total = consistency = jnp.mean(distance, axis=(1, 2, 3, 4))
        if self.adaptive_weight:
            face = face_weights(batch["face_mask"].astype(jnp.float32), clean)
            total = total + self.adaptive_weight * jnp.mean(distance * face, axis=(1, 2, 3, 4))
        return total, {"consistency": jnp.mean(consistency)}

    def neighbours(self, index: Int[Array, "b"]) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
        """Levels `index` of the teacher's sampler, and the next lower ones; at the last index 0."""
        sigmas = sigma_schedule(self.grid, self.shift)
        return sigmas[index], sigmas[index + 1]
