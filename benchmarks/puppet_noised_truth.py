"""Where on the way from noise to a video a denoiser loses what it is told: sampling that starts from the noised truth.

    python benchmarks/puppet_noised_truth.py --clips 16

The latents of held-out clips are noised to each level, and denoised from there by the levels of the model's sampler
that are left, with its guidance. Level 1 is sampling as usual. What is read of the results is what
benchmarks/puppet_quality.py reads; what a start at a level keeps and a start above it loses is decided between the two.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import mi_jax
from mi_jax.data.features import to_signed
from mi_jax.diffusion import add_noise, sigma_schedule
from mi_jax.models.tiling import encode_latents
from mi_jax.puppets.clips import draw
from mi_jax.puppets.reading import correlation, identity, mouth_opening, obedience
from mi_jax.sample.avatar import guidance_weights, guided_velocity
from mi_jax.sample.stream import stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    model: str = "puppet-teacher"
    clips: int = 16
    levels: tuple[float, ...] = (1.0, 0.98, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2)
    seconds: float = 2.6
    seed: int = 1000
    """Of the held-out puppets."""


def main(args: Args) -> None:
    avatar = mi_jax.load(args.model)
    config = avatar.config
    weights = guidance_weights(config.dit, {"audio": config.guidance_audio, "text": config.guidance_text})
    schedule = np.asarray(sigma_schedule(config.steps, config.shift))
    read: dict[float, list] = {level: [] for level in args.levels}
    for i in range(args.clips):
        clip = draw(i, seed=args.seed, split="test", seconds=args.seconds, size=config.height)
        truth = jnp.asarray(encode_latents(avatar.encoders.vae, to_signed(clip.video)[None]))
        noise = jax.random.normal(jax.random.key(0), truth.shape)
        conditions = avatar.conditions(clip.video[0], clip.mask[None], [clip.audio], clip.prompt, truth.shape[1])
        for level in args.levels:
            latents = add_noise(truth, noise, jnp.float32(level))
            left = np.append(level, schedule[schedule < level]).astype(np.float32)
            velocity = jax.tree_util.Partial(guided_velocity, avatar.dit, weights)
            made = np.concatenate(list(stream(velocity, latents, left, conditions)), axis=1)
            video = avatar.decode(made[0])[: len(clip.video)]
            row = {
                "correlation": correlation(mouth_opening(video, clip.attributes), clip.mouth[:, 0]),
                "identity": identity(video, clip.video[0], clip.attributes),
            }
            row |= {name: told == seen for name, (told, seen) in obedience(video, clip.attributes).items()}
            read[level].append(row)
    for level, rows in read.items():
        means = {name: round(float(np.mean([row[name] for row in rows])), 3) for name in rows[0]}
        print(json.dumps({"level": level} | means))


if __name__ == "__main__":
    main(tyro.cli(Args))
