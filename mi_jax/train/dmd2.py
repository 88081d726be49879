"""DMD2 with distillation of guidance and the paper's loss curriculum (paper 3.4, Eq. 5-7)."""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from mi_jax.bounds import Share, Shift, Within
from mi_jax.diffusion import add_noise, clean_from_velocity
from mi_jax.errors import InputError
from mi_jax.mesh import spec_of, spread_batch
from mi_jax.sample.guidance import Guidance
from mi_jax.train.adversarial import Discriminator, discriminator_loss, student_loss
from mi_jax.train.checkpoints import named_leaves
from mi_jax.train.distillation import Distillation, DistillationObjective, Rank, adapter_of, motion
from mi_jax.train.distribution_matching import (
    matching_gradient,
    matching_loss,
    matching_sigma,
    restore_norm,
    roll_out,
)
from mi_jax.train.flow import adaptive_loss, base_loss, per_example, region_area, squared_error
from mi_jax.train.schedules import Ramp
from mi_jax.train.turns import OptimizerConfig, Turn

FALLING, RISING = Ramp(start=1.0, end=0.0, steps=3000), Ramp(start=0.0, end=1.0, steps=3000)
NOTHING = Ramp(start=0.0, end=0.0)


class DMD2(Distillation):
    """A distillation whose critic says what the student makes, and a discriminator, if one is asked."""

    def __init__(self, *parts: nnx.Module, discriminator: Discriminator | None = None):
        super().__init__(*parts)
        self.discriminator = discriminator


@dataclasses.dataclass(frozen=True, kw_only=True)
class DMD2Objective(DistillationObjective):
    """Two turns. The student's minimises `w_base(k) L_base + w_matching(k) L_SDS`, and what is asked beyond the paper;
    the critic's is flow matching on what the student makes (Eq. 6).

    L_base is the curriculum's loss at the student's levels, on the data. With `base.end` above 0 it is the real-data
    term that later works keep against lost motion.
    """

    critic_rank: Rank = 64
    """Of the critic's factors beside the teacher's weights."""
    critic_turns: Annotated[int, Within(1, 1000)] = 5
    """Turns of the critic before each of the student."""
    critic: OptimizerConfig | None = None
    """None: the experiment's."""
    base: Ramp = FALLING
    matching: Ramp = RISING
    """Weights of L_base and L_SDS by the step of the run: the paper's curriculum, whose numbers it does not give."""
    matching_shift: Shift | None = None
    """Of the levels at which teacher and critic are compared; None: `shift`."""
    matching_levels: tuple[Share, Share] = (0.02, 0.98)
    """Where these are clipped."""
    restore_norm: Share = 0.0
    """How far guidance may not change the spread of what the teacher takes for clean: against saturation."""
    follow: Share = 0.0
    """Share of the student that the critic takes over after each of the student's steps (SenseFlow's implicit
    distribution alignment; 0.03 there). For a student of factors, of the critic's rank."""
    motion_floor: Share = 0.0
    """The student is pushed where its motion falls below this share of the data's; 0: nowhere."""
    motion_weight: float = 0.05
    gan: Ramp = NOTHING
    """Weight of the adversarial term; 0 throughout: there is no discriminator."""
    gan_taps: tuple[tuple[Literal["double", "single"], int], ...] = ()
    """Blocks of the teacher whose hidden states the discriminator sees."""
    gan_hidden: Annotated[int, Within(1, 2**16)] = 256
    gan_r1: Annotated[float, Within(0, 1e6)] = 0.0
    """Weight of the approximate R1 penalty: how far the logit of the data moves when a little noise is added."""
    gan_r1_noise: Annotated[float, Within(above=0, most=1)] = 0.05

    def __post_init__(self):
        super().__post_init__()
        if self.follow and self.student_rank != self.critic_rank:
            raise InputError(
                f"follow {self.follow}: a critic of rank {self.critic_rank} cannot follow "
                + ("a student of all weights" if self.student_rank is None else f"one of rank {self.student_rank}")
            )
        if not self.gan.is_zero and not self.gan_taps:
            raise InputError("gan_taps is empty: the discriminator needs hidden states")
        for kind, number in self.gan_taps:
            depth = getattr(self.dit, f"{kind}_depth")
            if not 0 <= number < depth:
                raise InputError(f"gan_taps: there is no {kind} block {number}, but {depth} of them")
        if self.matching_levels[0] >= self.matching_levels[1]:
            raise InputError(f"matching_levels {self.matching_levels}: must rise")

    @property
    def turns(self) -> tuple[Turn, ...]:
        critics = ("critic", "discriminator")
        critic = Turn(name="critic", trains=lambda path: path[0] in critics, optimizer=self.critic)
        return (*super().turns, critic)

    def turn(self, step: int) -> str:
        return "student" if step % (self.critic_turns + 1) == self.critic_turns else "critic"

    def make(self, key: Key[Array, ""]) -> DMD2:
        keys = jax.random.split(key, 3)
        base = super().make(keys[0])
        critic = adapter_of(base.teacher, self.critic_rank, keys[1])
        discriminator = None
        if not self.gan.is_zero:
            discriminator = Discriminator(self.dit, self.gan_taps, self.gan_hidden, rngs=nnx.Rngs(keys[2]))
        return DMD2(base.teacher, base.student, critic, discriminator=discriminator)

    def evaluations(self, turn: str) -> tuple[float, float]:
        before = (len(self.levels) - 1) / 2
        judged = 0 if self.gan.is_zero else 1
        if turn == "critic":
            return before + 1 + judged * (3 if self.gan_r1 else 2), 1.0
        branches = Guidance(audio=self.guidance_audio, text=self.guidance_text).branches
        return before + 1 + branches + bool(self.restore_norm), 1.0 + (not self.base.is_zero) + judged

    def after(self, turn: str, params: Any, others: dict[str, Any], step: Array) -> Any:
        """A turn's parameters after its update: the critic's first step after the student's ends nearer to it."""
        if turn != "critic" or not self.follow:
            return params
        share = jnp.where((step > 0) & (step % (self.critic_turns + 1) == 0), self.follow, 0.0)
        student = named_leaves(others["student"])

        def follow(path, own):
            name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
            other = student.get(name.replace("critic.", "student.", 1))
            return own if other is None else own + share * (other - own)

        return jax.tree_util.tree_map_with_path(follow, params)

    def loss(
        self,
        model: DMD2,
        batch: dict[str, Array | np.ndarray],
        key: Key[Array, ""],
        turn: str,
        step: Array | int,
    ) -> tuple[Float[Array, "b"], dict[str, Array]]:
        """What `turn` minimises, for each example; scalars beside it.

        student: base and matching (both losses) and their weights, gradient (the rms of Eq. 5's) and normaliser (its
        denominator), and motion as a ratio to the data's; missing_motion and gan where they are asked. critic: fake
        (Eq. 6), motion, and what the discriminator says of data and student (judged_real, judged_fake).
        """
        keys = jax.random.split(key, 3)
        clean = batch["latents"].astype(jnp.float32)
        sigmas = self.sigmas()
        noise = jax.random.normal(keys[0], clean.shape, jnp.float32, out_sharding=spec_of(clean))
        exit_step = jax.random.randint(keys[1], (), 0, len(self.levels))  # the same on every device
        student = model.denoiser("student")
        told = self.conditions(student, batch)
        if turn == "student":
            made = roll_out(student, noise, sigmas, exit_step, told)
            return self._student_loss(model, student, batch, clean, made, told, keys[2], step)
        made = jax.lax.stop_gradient(roll_out(jax.lax.stop_gradient(student), noise, sigmas, exit_step, told))
        return self._critic_loss(model, batch, clean, made, keys[2])

    def _student_loss(self, model, student, batch, clean, made, told, key, step):
        keys = jax.random.split(key, 4)
        teacher, critic = (jax.lax.stop_gradient(model.denoiser(name)) for name in ("teacher", "critic"))
        sigma, noise = self._levels_and_noise(made, keys[0])
        noised = add_noise(made, noise, sigma)
        held, heard = jax.lax.stop_gradient(noised), self.conditions(teacher, batch)
        fake = clean_from_velocity(held, critic(held, sigma, heard), sigma)
        real = clean_from_velocity(held, self.guidance(sigma, keys[1])(teacher)(held, sigma, heard), sigma)
        if self.restore_norm:
            real = restore_norm(real, clean_from_velocity(held, teacher(held, sigma, heard), sigma), self.restore_norm)
        gradient, normaliser = matching_gradient(made, fake, real)
        face = batch["face_mask"].astype(jnp.float32)
        matching = matching_loss(made, gradient)
        if self.adaptive_weight:
            matching += self.adaptive_weight * matching_loss(made, gradient, face_weights(face, made))

        level = self._level(keys[2], clean)
        noise = jax.random.normal(keys[3], clean.shape, jnp.float32, out_sharding=spec_of(clean))
        scalars = {"gradient": jnp.sqrt(jnp.mean(jnp.square(gradient))), "normaliser": jnp.mean(normaliser)}
        w_matching = self.matching(step)
        total = w_matching * matching
        if not self.base.is_zero:
            error = squared_error(student, clean, noise, level, told)
            base = base_loss(error) + self.adaptive_weight * adaptive_loss(error, face)
            w_base = self.base(step)
            total = total + w_base * base
            scalars |= {"base": jnp.mean(base), "w_base": w_base}
        moved = motion(made)
        if self.motion_floor:
            least = self.motion_floor * motion(clean)
            missing = jnp.maximum(jnp.log(jnp.maximum(least, 1e-6)) - jnp.log(jnp.maximum(moved, 1e-6)), 0.0)
            total = total + self.motion_weight * missing
            scalars["missing_motion"] = jnp.mean(missing)
        if model.discriminator is not None:
            judge = jax.lax.stop_gradient(model.discriminator)
            adversarial = student_loss(judge(teacher, noised, sigma, heard))
            total = total + self.gan(step) * adversarial
            scalars["gan"] = jnp.mean(adversarial)
        return total, scalars | {
            "matching": jnp.mean(matching),
            "w_matching": w_matching,
            "motion": jnp.mean(moved) / jnp.maximum(jnp.mean(motion(clean)), 1e-6),
        }

    def _critic_loss(self, model, batch, clean, made, key):
        keys = jax.random.split(key, 2)
        critic = model.denoiser("critic")
        sigma, noise = self._levels_and_noise(made, keys[0])
        error = squared_error(critic, made, noise, sigma, self.conditions(model.teacher, batch))
        fake = base_loss(error) + self.adaptive_weight * adaptive_loss(error, batch["face_mask"].astype(jnp.float32))
        moved = jnp.mean(motion(made)) / jnp.maximum(jnp.mean(motion(clean)), 1e-6)
        total, scalars = fake, {"fake": jnp.mean(fake), "motion": moved}
        if model.discriminator is not None:
            teacher = jax.lax.stop_gradient(model.denoiser("teacher"))
            told = (sigma, noise, self.conditions(teacher, batch), keys[1])
            loss, parts = self._discriminator_loss(model.discriminator, teacher, clean, made, *told)
            total, scalars = total + loss, scalars | parts
        return total, scalars

    def _discriminator_loss(self, judge, teacher, clean, made, sigma, noise, heard, key):
        """Of the data and of what the student makes, under the same noise: one batch of both, and of the data with a
        little more noise where R1 is asked."""
        real, fake = add_noise(clean, noise, sigma), add_noise(made, noise, sigma)
        parts = [real, fake]
        if self.gan_r1:
            more = jax.random.normal(key, real.shape, jnp.float32, out_sharding=spec_of(real))
            parts.append(real + self.gan_r1_noise * more)
        n = len(parts)
        together = (
            jnp.concatenate(parts),
            jnp.concatenate([sigma] * n),
            jax.tree.map(lambda x: jnp.concatenate([x] * n), heard),
        )
        logits = jnp.split(judge(teacher, *spread_batch(together)), n)
        loss = discriminator_loss(logits[0], logits[1])
        scalars = {"judged_real": jnp.mean(logits[0]), "judged_fake": jnp.mean(logits[1])}
        if self.gan_r1:
            loss = loss + self.gan_r1 * jnp.square(logits[2] - logits[0])
        return loss, scalars

    def _levels_and_noise(self, made: Array, key: Array) -> tuple[Array, Array]:
        """At which critic and teacher are compared, and the critic is trained."""
        level, noise = jax.random.split(key)
        shift = self.shift if self.matching_shift is None else self.matching_shift
        sigma = per_example(matching_sigma(level, made.shape[:1], shift, *self.matching_levels), made)
        return sigma, jax.random.normal(noise, made.shape, jnp.float32, out_sharding=spec_of(made))

    def _level(self, key: Array, clean: Array) -> Array:
        """One of the student's levels for each example."""
        return per_example(self.sigmas()[jax.random.randint(key, clean.shape[:1], 0, len(self.levels))], clean)


def face_weights(
    region: Float[Array, "b h w"] | Float[Array, "b t h w"], latents: Float[Array, "b t h w c"]
) -> Float[Array, "b t h w c"]:
    """Of every element, so that a mean with them is that over the face alone, which may move (`flow.adaptive_loss`)."""
    h, w = region.shape[-2:]
    share = region * (h * w) / region_area(region).reshape(-1, *[1] * (region.ndim - 1))
    share = share[:, None] if region.ndim == 3 else share
    return jnp.broadcast_to(share[..., None], latents.shape)
