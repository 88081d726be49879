"""What distilled denoisers have in common: a frozen teacher, a student of few levels, and samples of both."""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from mi_jax.bounds import Guidance as GuidanceWeight
from mi_jax.bounds import Level, SamplingSteps, Share, Within, check_levels
from mi_jax.data.features import to_pixels
from mi_jax.diffusion import shift_sigma, sigma_schedule
from mi_jax.errors import InputError
from mi_jax.mesh import spec_of
from mi_jax.models import lora
from mi_jax.models.dit import DiT
from mi_jax.models.tiling import decode_latents
from mi_jax.sample.guidance import Guidance
from mi_jax.train.checkpoints import start_from
from mi_jax.train.denoiser import DenoiserObjective, cached_vae, euler
from mi_jax.train.state import sharded_init
from mi_jax.train.turns import OptimizerConfig, Turn

Rank = Annotated[int, Within(1, 4096)]


class Distillation(nnx.Module):
    """A teacher that is never trained, and what is: each a denoiser, or the factors that make one of the teacher.

    student: a `DiT`, or an `Adapter` of the teacher. critic: an `Adapter` of the teacher; None where nothing needs one.
    """

    def __init__(self, teacher: DiT, student: DiT | lora.Adapter, critic: lora.Adapter | None = None):
        self.teacher, self.student, self.critic = teacher, student, critic

    def denoiser(self, name: Literal["teacher", "student", "critic"]) -> DiT:
        """The velocity of this name."""
        part = getattr(self, name)
        return lora.adapt(self.teacher, part.factors()) if isinstance(part, lora.Adapter) else part


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationObjective(DenoiserObjective):
    """A student that needs a few of its teacher's many evaluations. Subclasses say how it is taught.

    Its conditions are never dropped: it is sampled without guidance.
    """

    teacher: str
    """Shipped model, model folder or finished run whose denoiser is the teacher, and the student at step 0."""
    teacher_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """In which the teacher lies in memory."""
    student_from: str | None = None
    """Another start of the student: a run or model of the same `dit` (for a student that is all weights)."""
    student_rank: Rank | None = None
    """None: all weights of the student are trained. Else it is the teacher and factors of this rank (LoRA): no second
    set of weights."""
    levels: tuple[Level, ...] = (1.0, 0.75, 0.5, 0.25)
    """Noise levels of the student's Euler steps, before the shift, falling from 1; 0 is where the last one leads."""
    guidance_audio: GuidanceWeight = 0.0
    guidance_text: GuidanceWeight = 0.0
    """Mean weights of the teacher's guidance (`Guidance`), which the student learns with everything else."""
    guidance_spread: Share = 0.2
    """Of each weight, drawn for each example from N(w, (spread w)^2) and clipped at 0."""
    guidance_band: tuple[Share, Share] = (0.0, 1.0)
    """Noise levels, as the network is fed them, at which the weight of the audio is not 0."""
    two_fold_above: Share = 0.75
    """Noise level from which on guidance is two-fold (Eq. 7)."""
    student: OptimizerConfig | None = None
    """None: the experiment's."""
    sample_steps: SamplingSteps = 25
    """Of the guided teacher, in the samples shown during training."""

    def __post_init__(self):
        super().__post_init__()
        check_levels(self.levels)
        if self.guidance_band[0] > self.guidance_band[1]:
            raise InputError(f"guidance_band {self.guidance_band}: ends before it begins")
        if self.student_from is not None and self.student_rank is not None:
            raise InputError("student_from and student_rank: a student of factors starts as the teacher")

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(name="student", trains=lambda path: path[0] == "student", optimizer=self.student),)

    def make(self, key: Key[Array, ""]) -> Distillation:
        """The module, before any weights are read."""
        keys = jax.random.split(key, 3)
        teacher = DiT(self.dit, rngs=nnx.Rngs(keys[0]))
        if self.student_rank is None:
            student = DiT(self.dit, rngs=nnx.Rngs(keys[1]))
        else:
            student = adapter_of(teacher, self.student_rank, keys[1])
        return Distillation(cast(teacher, self.teacher_dtype), student)

    def init(self, key: Key[Array, ""]) -> Distillation:
        return sharded_init(self.make, key)

    def warm_start(self, model: Distillation) -> Distillation:
        """The module with the teacher's weights, in the student too.

        Raises:
          InputError: the teacher is not there, or is of another size than `dit`.
        """
        read = start_from(model.teacher, self.teacher, "dit", whole=True)
        model.teacher = cast(read, self.teacher_dtype)
        if self.student_rank is None:
            if self.student_from is not None:
                read = start_from(model.student, self.student_from, "dit", whole=True)
            # Buffers of its own: the step donates the student's.
            model.student = jax.tree.map(jnp.copy, cast(read, "float32"))
        return model

    def sigmas(self) -> Float[Array, "levels"]:
        """The student's levels as the network is fed them, and 0."""
        return shift_sigma(jnp.asarray([*self.levels, 0.0], jnp.float32), self.shift)

    def guidance(self, sigma: Float[Array, "b"], key: Key[Array, ""]) -> Guidance:
        """The teacher's at these noise levels, of weights drawn for each example."""
        drawn = []
        for mean, own in zip((self.guidance_audio, self.guidance_text), jax.random.split(key)):
            around = 1 + self.guidance_spread * jax.random.normal(own, sigma.shape, out_sharding=spec_of(sigma))
            drawn.append(mean * jnp.maximum(around, 0.0) if mean else 0.0)
        audio, text = drawn
        low, high = self.guidance_band
        if not isinstance(audio, float):
            audio = jnp.where((sigma >= low) & (sigma <= high), audio, 0.0)
        return Guidance(audio=audio, text=text, two_fold_above=self.two_fold_above)

    def sample(
        self, model: Distillation, batch: dict[str, Array], key: Key[Array, ""]
    ) -> dict[str, Float[Array, "b t h w c"]]:
        """Latents of a batch's windows: true, of the guided teacher in `sample_steps`, and of the student in its own,
        both from the same noise."""
        truth = batch["latents"].astype(jnp.float32)
        noise = jax.random.normal(key, truth.shape, jnp.float32, out_sharding=spec_of(truth))
        teacher, student = model.denoiser("teacher"), model.denoiser("student")
        conditions = self.conditions(teacher, batch)
        guided = Guidance(audio=self.guidance_audio, text=self.guidance_text, two_fold_above=self.two_fold_above)(
            teacher
        )
        return {
            "truth": truth,
            "teacher": euler(guided, noise, sigma_schedule(self.sample_steps, self.shift), conditions),
            "student": euler(student, noise, self.sigmas(), self.conditions(student, batch)),
        }

    def show(self, sampled: dict[str, np.ndarray]) -> dict[str, np.ndarray | float]:
        """The first window of what `sample` gave, as uint8 frames one above the other; and how much the student moves,
        as a ratio to the teacher."""
        vae = cached_vae(self.sample_vae)
        rows = [to_pixels(decode_latents(vae, latents[:1])[0]) for latents in sampled.values()]
        moved = {name: float(np.mean(motion(jnp.asarray(latents)))) for name, latents in sampled.items()}
        return {
            ", ".join(sampled): np.concatenate(rows, axis=1),
            "student's motion to the teacher's": moved["student"] / max(moved["teacher"], 1e-9),
            "teacher's motion to the truth's": moved["teacher"] / max(moved["truth"], 1e-9),
        }


def motion(latents: Float[Array, "b t h w c"]) -> Float[Array, "b"]:
    """How much moves: the mean over places and channels of the standard deviation over time."""
    return jnp.mean(jnp.std(latents.astype(jnp.float32), axis=1), axis=(1, 2, 3))


def adapter_of(model: DiT, rank: int, key: Key[Array, ""]) -> lora.Adapter:
    """New factors of the kernels of all blocks: zero, so that they change nothing."""
    return lora.Adapter(lora.init(nnx.state(model), rank=rank, key=key, adapts=lora.blocks_alone))


def cast(module: DiT, dtype: str) -> DiT:
    """The module with all its parameters in `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, module)
