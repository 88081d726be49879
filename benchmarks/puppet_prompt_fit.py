"""What a denoiser knows of a prompt, whatever it draws: does the right direction fit a true clip best?

    python benchmarks/puppet_prompt_fit.py --clips 24

Each held-out clip is noised to several levels and denoised under prompts that differ in one attribute alone, in the
same words otherwise. Printed is how often the true value has the least error (in the face; for background motion in
the whole picture), for each level and for all together, beside chance. A denoiser that fits and does not draw lacks
the means to draw, not the text.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import mi_jax
from mi_jax.data.features import clip_record, prompt_features
from mi_jax.diffusion import add_noise, velocity_target
from mi_jax.models.dit import DiT
from mi_jax.puppets.backgrounds import KINDS
from mi_jax.puppets.clips import draw, generators
from mi_jax.puppets.looks import sample_look
from mi_jax.puppets.motion import EXPRESSIONS, HEAD_MOTIONS, Direction
from mi_jax.puppets.prompts import write_prompt
from mi_jax.train.curriculum import CurriculumObjective
from mi_jax.train.windows import cut_window

LEVELS = (0.3, 0.5, 0.7, 0.85, 0.95)
EASED = 4  # latent frames in which expression and motion have hardly begun


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    model: str = "puppet-teacher"
    clips: int = 24
    seconds: float = 2.6
    seed: int = 77
    first: int = 9000
    draws: int = 2
    """Noises per level."""


@jax.jit
def errors(model: DiT, told: dict, sigma, key):
    """Squared errors of prompts [n] on one clip: in the face, and in all."""
    conditions = CurriculumObjective(dit=model.config, records="").conditions(model, told)
    clean = told["latents"].astype(jnp.float32)
    noise = jnp.broadcast_to(jax.random.normal(key, clean.shape[1:]), clean.shape)
    level = jnp.full(clean.shape[:1], sigma)
    error = jnp.square(model(add_noise(clean, noise, level), level, conditions) - velocity_target(clean, noise))
    error = error[:, EASED:].sum((1, 4))
    return (error * told["face_mask"]).sum((1, 2)), error.sum((1, 2))


def choices(direction: Direction, background: str, motion: str) -> dict[str, tuple[list, int]]:
    """Per attribute the directions it could have, and which is the true one."""
    said = lambda name, values: [(dataclasses.replace(direction, **{name: v}), motion) for v in values]  # noqa: E731
    found = {
        "expression": (said("expression", EXPRESSIONS), EXPRESSIONS.index(direction.expression)),
        "head_motion": (said("head_motion", HEAD_MOTIONS), HEAD_MOTIONS.index(direction.head_motion)),
    }
    motions = KINDS[background]
    return found | {"background_motion": ([(direction, m) for m in motions], motions.index(motion))}


def main(args: Args) -> None:
    avatar = mi_jax.load(args.model)
    hits: dict[str, list] = {}
    chance: dict[str, list] = {}
    for i in range(args.first, args.first + args.clips):
        clip = draw(i, seed=args.seed, split="test", seconds=args.seconds, size=avatar.config.height)
        look, kind = sample_look(generators(i, args.seed, "test")[0]), clip.attributes["background"]["kind"]
        record = clip_record(avatar.encoders, clip.video, clip.audio[None], clip.prompt, clip.mask[None])
        length = len(record["latents"])
        window = cut_window(record, np.random.default_rng(0), length=length, mid_clip=0.0, speakers=1)
        direction, motion = Direction(**clip.attributes["direction"]), clip.attributes["background_motion"]
        for name, (options, truth) in choices(direction, kind, motion).items():
            prompts = [write_prompt(np.random.default_rng(i), look, told, kind, moved) for told, moved in options]
            prompts += prompts[-1:] * (len(EXPRESSIONS) - len(prompts))  # one program for all
            features = [prompt_features(avatar.encoders, clip.video[0], prompt)[0] for prompt in prompts]
            told = {key: np.stack([{**window, **f}[key] for f in features]) for key in window}
            told = {key: jnp.asarray(x.astype(np.float16) if x.dtype == np.float32 else x) for key, x in told.items()}
            told |= {key: told[key].astype(jnp.float32) for key in ("portrait", "is_start", "face_mask", "audio_mask")}
            column = 1 if name == "background_motion" else 0
            each = np.array(
                [
                    sum(
                        np.asarray(errors(avatar.dit, told, jnp.float32(level), jax.random.key(k))[column])
                        for k in range(args.draws)
                    )
                    for level in LEVELS
                ]
            )[:, : len(options)]
            together = (each / each.mean(1, keepdims=True)).sum(0)
            hits.setdefault(name, []).append([*(each.argmin(1) == truth), together.argmin() == truth])
            chance.setdefault(name, []).append(1 / len(options))
    for name, rows in hits.items():
        shares = dict(zip([*map(str, LEVELS), "all"], np.mean(rows, 0).round(2).tolist()))
        print(json.dumps({"attribute": name, "chance": round(float(np.mean(chance[name])), 2), "fits best": shares}))


if __name__ == "__main__":
    main(tyro.cli(Args))
